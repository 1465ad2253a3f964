"""Progress of each process of a run, published without a collective, so that a hang has a name.

Each process writes one JSON object to `WORKDIR/progress/process_N.json`, by an atomic rename: when
its section changes, and else every few seconds (`interval`) as long as it lives. A thread writes
it, so that a slow file system holds up no step. Its keys:

| key | value |
| --- | --- |
| process, processes | number of this process from 0, and how many there are |
| host, pid | where it runs |
| attempt | number of this start of the run in this workdir, from 0 |
| section | join, start, compile, first_step, step, save, evaluation, end; ended |
| step | the last step that was dispatched, since the start of the run |
| time | Unix seconds at which section or step last changed |
| median_step_seconds | of the steps of this process; null before it is known |
| beat | Unix seconds of this write; a process that writes no more hangs or is gone |
| code, reason | of a process that ended by itself: exit code and line; else null and "" |

Process 0 also writes `WORKDIR/progress/restarts.json` at each start, with the keys attempt, step
(newest checkpoint at this start), without_progress (starts in a row, before this one, that made no
new checkpoint), time, code and reason (of the end; null and "" while the run goes on).
"""
