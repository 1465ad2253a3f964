"""Parser and reader of compiled programs, on HLO written by hand."""

import pytest
from snippets import MESH, STEP

from deepseek_jax.aot import compiled, hlo

KERNELS = {"my_kernel": lambda a: 2.0 * a[0].elements * a[1].shape[-1]}
BYTES = 64 * 32 * 2  # of the array that everything moves


@pytest.fixture(scope="module")
def module():
    return hlo.parse(STEP)


@pytest.fixture(scope="module")
def found(module):
    return {c.name: c for c in compiled.collectives(module, MESH, KERNELS)}


def test_computations_and_schedule(module):
    assert module.entry == "main"
    names = ["fused", "wrapped", "body", "condition", "short", "long", "main"]
    assert list(module.computations) == names
    assert list(module.computations["body"])[-3:] == ["gemm", "fast-done", "next"]
    loop = module.computations["main"]["loop"]
    assert (loop.trips, loop.body, loop.calls) == (3, "body", ("condition", "body"))
    assert module.computations["main"]["either"].calls == ("short", "long")
    assert compiled.scheduled(module) == {
        "main": ("entry", 1),
        "body": ("while", 3),
        "condition": ("while", 3),
        "short": ("conditional", 1),
        "long": ("conditional", 1),
    }


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [
        ("bf16", (3, 5), 30),
        ("f8e4m3fn", (7,), 7),
        ("s4", (3,), 2),
        ("pred", (2, 2), 4),
        ("f32", (), 4),
    ],
)
def test_bytes_of_an_array(dtype, shape, size):
    assert hlo.Array(dtype, shape).bytes == size


@pytest.mark.parametrize(
    ("written", "want"),
    [
        ("replica_groups={{0,1},{2,3}}", [(0, 1), (2, 3)]),
        ("replica_groups={}", [(0, 1, 2, 3, 4, 5, 6, 7)]),
        ("replica_groups=[2,4]<=[8]", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replica_groups=[4,2]<=[2,2,2]T(2,0,1)", [(0, 2), (4, 6), (1, 3), (5, 7)]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [(0, 1, 4, 5), (2, 3, 6, 7)]),
        (
            "replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}",
            [(0, 2, 4, 6), (1, 3, 5, 7)],
        ),
        ("source_target_pairs={{0,1},{1,0}}", [(0, 1), (1, 0)]),
    ],
)
def test_every_spelling_of_groups(written, want):
    text = f"f32[] all-to-all(%x), channel_id=1, {written}, dimensions={{0}}"
    head = "HloModule m, is_scheduled=true\n\nENTRY %e (x: f32[]) -> f32[] {\n"
    line = hlo.parse(f"{head}  ROOT %a = {text}\n}}\n").computations["e"]["a"]
    assert hlo.groups(line, 8).tolist() == [list(group) for group in want]


def test_an_unknown_spelling_is_an_error():
    line = hlo.Instruction("a", "all-to-all", (), (), ", replica_groups=@mesh{'x'}", False)
    with pytest.raises(ValueError, match=r"unknown replica groups of a: .*@mesh"):
        hlo.groups(line, 8)


def test_an_unscheduled_text_is_an_error():
    with pytest.raises(ValueError, match=r"pass compiled.as_text\(\)"):
        hlo.parse("HloModule step\n")


def test_every_collective_is_found_once(found):
    assert sorted(found) == ["fast-start.7", "shift-start", "slow", "whole"]
    kinds = {name: c.kind for name, c in found.items()}
    assert kinds == {
        "slow": "all-to-all",
        "fast-start.7": "all-to-all",
        "shift-start": "collective-permute",
        "whole": "all-gather",
    }


def test_axes_bytes_and_hops(found):
    slow, fast, whole = found["slow"], found["fast-start.7"], found["whole"]
    assert (slow.axes, slow.group, slow.bytes) == (("node",), 2, BYTES)
    assert (slow.slow_bytes, slow.fast_bytes) == (BYTES / 2, 0)
    assert (fast.axes, fast.group, fast.bytes) == (("gpu",), 4, BYTES)
    assert (fast.slow_bytes, fast.fast_bytes) == (0, BYTES * 3 / 4)
    # To the one other host once, and inside the host: two hosts' parts to three others.
    assert (whole.axes, whole.group) == (("node", "gpu"), 8)
    assert (whole.slow_bytes, whole.fast_bytes) == (BYTES, 2 * 3 * BYTES)
    shift = found["shift-start"]
    assert (shift.axes, shift.slow_bytes, shift.fast_bytes) == (("gpu",), 0, BYTES)


def test_what_runs_between_start_and_done(found, module):
    slow, fast = found["slow"], found["fast-start.7"]
    assert [(g.name, g.op, g.times) for g in slow.gemms] == [
        ("triton", "my_kernel", 1),
        ("gemm", "__cublas$lt$matmul", 3),
    ]
    assert {g.flops for g in slow.gemms} == {2 * 64 * 32 * 32}
    assert {g.bytes for g in slow.gemms} == {2 * BYTES + 32 * 32 * 2}
    assert (fast.computation, fast.inside, fast.times) == ("body", "while", 3)
    assert [g.name for g in fast.gemms] == ["gemm"]
    assert slow.overlapped and fast.overlapped
    # A kernel that is not listed does not count as a GEMM.
    plain = {c.name: c for c in compiled.collectives(module, MESH)}
    assert [g.name for g in plain["slow"].gemms] == ["gemm"]


def test_what_waits_is_not_overlapped(found):
    shift, whole = found["shift-start"], found["whole"]
    assert shift.is_sync and not shift.overlapped
    assert whole.is_sync and whole.start == whole.done and not whole.overlapped


def test_sync_wins_over_a_gemm_in_between(module):
    text = STEP.replace('"is_sync":false', '"is_sync":true')
    both = {c.name: c for c in compiled.collectives(hlo.parse(text), MESH)}
    assert both["fast-start.7"].gemms and not both["fast-start.7"].overlapped


def test_a_gemm_inside_a_fusion(module):
    fused = module.computations["main"]["product"]
    (gemm,) = compiled.gemms(module, "main", fused)
    assert (gemm.op, gemm.flops) == ("dot", 2 * 64 * 32 * 16)


def test_a_loop_of_unknown_length():
    text = STEP.replace(', backend_config={"known_trip_count":{"n":"3"}}', "")
    found = {c.name: c for c in compiled.collectives(hlo.parse(text), MESH)}
    assert found["fast-start.7"].times is None
    assert [g.times for g in found["slow"].gemms] == [1]


ADDING = """HloModule sums, is_scheduled=true

%narrow (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %plus = bf16[] add(%a, %b)
}

%rounds (c: f32[], d: f32[]) -> f32[] {
  %c = f32[] parameter(0)
  %d = f32[] parameter(1)
  %plus.1 = f32[] add(%c, %d)
  %low = bf16[] convert(%plus.1)
  ROOT %high = f32[] convert(%low)
}

%wide (e: f32[], f: f32[]) -> f32[] {
  %e = f32[] parameter(0)
  %f = f32[] parameter(1)
  ROOT %plus.2 = f32[] add(%e, %f)
}

%largest (g: bf16[], h: bf16[]) -> bf16[] {
  %g = bf16[] parameter(0)
  %h = bf16[] parameter(1)
  ROOT %most = bf16[] maximum(%g, %h)
}

%count (i: s32[], j: s32[]) -> s32[] {
  %i = s32[] parameter(0)
  %j = s32[] parameter(1)
  ROOT %plus.3 = s32[] add(%i, %j)
}

ENTRY %e (x: bf16[8], y: f32[8], n: s32[8,1], z: bf16[], w: f32[], k: s32[]) -> f32[] {
  %x = bf16[8]{0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %n = s32[8,1]{1,0} parameter(2)
  %z = bf16[] parameter(3)
  %w = f32[] parameter(4)
  %k = s32[] parameter(5)
  %ranks = bf16[8]{0} all-reduce-start(%x), replica_groups={{0,1}}, to_apply=%narrow
  %ranks.1 = bf16[8]{0} all-reduce-done(%ranks)
  %rounded = f32[] reduce(%y, %w), dimensions={0}, to_apply=%rounds
  %most.1 = bf16[] reduce(%x, %z), dimensions={0}, to_apply=%largest
  %some = s32[1]{0} reduce(%n, %k), dimensions={0}, to_apply=%count
  %once = f32[8]{0} scatter(%y, %n, %y), unique_indices=true, to_apply=%wide
  ROOT %again = f32[8]{0} scatter(%y, %n, %y), to_apply=%wide
}
"""


def test_types_of_sums():
    """A sum may be rounded after each addition, and its arrays be wide all the same."""
    found = list(hlo.sums(hlo.parse(ADDING)))
    assert {line.name: dtype for line, dtype in found} == {
        "ranks": "bf16",
        "rounded": "bf16",
        "once": "f32",
        "again": "f32",
    }
    assert [line.name for line, _ in found if line.unique] == ["once"]


COPY = "%big = bf16[64,32]{1,0} copy(%shift-done)"
FUSED = """%pure (p.4: bf16[64,32]) -> bf16[64,32] {
  %p.4 = bf16[64,32]{1,0} parameter(0)
  ROOT %moved = bf16[64,32]{1,0} copy(%p.4)
}

ENTRY"""


def test_copies_plain_fused_and_to_elsewhere(module):
    want = [("big", BYTES, 1)]
    fused = STEP.replace("ENTRY", FUSED).replace(COPY, COPY.replace("copy(", "fusion("))
    fused = fused.replace("fusion(%shift-done)", "fusion(%shift-done), kind=kLoop, calls=%pure")
    split = STEP.replace(
        COPY,
        "%away = (bf16[64,32]{1,0:S(5)}, bf16[64,32]{1,0}, u32[]) copy-start(%shift-done)\n  "
        "%big = bf16[64,32]{1,0:S(5)} copy-done(%away)",
    )
    for each in (module, hlo.parse(fused), hlo.parse(split)):
        assert [(c.name, c.bytes, c.times) for c in compiled.copies(each)] == want
    more = fused.replace("copy(%p.4)", "negate(%p.4)")
    assert compiled.copies(hlo.parse(more)) == ()


ATTENTION = """HloModule attention, is_scheduled=true

ENTRY %e (q: bf16[2,96,8,192], k: bf16[2,64,8,192], v: bf16[2,64,8,128]) -> bf16[2,8,96,128] {
  %q = bf16[2,96,8,192]{3,2,1,0} parameter(0)
  %k = bf16[2,64,8,192]{3,2,1,0} parameter(1)
  %v = bf16[2,64,8,128]{3,2,1,0} parameter(2)
  ROOT %a = (bf16[2,8,96,128]{3,1,2,0}, u8[4096]{0}) custom-call(%q, %k, %v), \
custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": \
{"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "8", "96", "64"]}, \
"is_dynamic_dimension": [false], "mask_type": "NO_MASK"}}
}
""".replace("\\\n", "")


@pytest.mark.parametrize(
    ("change", "widths"),
    [
        (("", ""), 192 + 128),
        (("Softmax", "SoftmaxBackward"), 3 * 192 + 2 * 128),
        (("NO_MASK", "CAUSAL"), (192 + 128) / 2),
    ],
)
def test_operations_of_cudnn_s_attention(change, widths):
    module = hlo.parse(ATTENTION.replace(*change))
    (gemm,) = compiled.gemms(module, "e", module.computations["e"]["a"])
    assert gemm.flops == 2 * 2 * 8 * 96 * 64 * widths
    query, key, value, out = 96 * 192, 64 * 192, 64 * 128, 96 * 128
    assert gemm.bytes == 2 * 8 * 2 * (query + key + value + out)  # no workspace


@pytest.mark.parametrize(
    ("kind", "want"),
    [  # 8 devices on 2 hosts; 800 bytes go in
        ("all-to-all", (400, 300)),  # 100 to each partner, 4 there and 3 here
        ("ragged-all-to-all", (400, 300)),
        ("all-gather", (800, 4800)),
        ("reduce-scatter", (100, 600)),  # the same backwards, of an eighth
        ("all-reduce", (200, 1200)),  # one after the other
        ("collective-permute", (800, 0)),
    ],
)
def test_traffic_of_each_kind(kind, want):
    assert compiled.traffic(kind, 800, 8, 2) == want


@pytest.mark.parametrize("pairs", ["{}", "{{0,0},{1,1}}"])
def test_a_permute_to_oneself_moves_nothing(pairs):
    text = STEP.replace("{{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}", pairs)
    found = {c.name: c for c in compiled.collectives(hlo.parse(text), MESH)}
    shift = found["shift-start"]
    assert (shift.axes, shift.slow_bytes, shift.fast_bytes) == ((), 0, 0)
