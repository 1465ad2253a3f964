"""Dependences between the chunks of a tick, found in programs written by hand."""

import pytest

from deepseek_jax.aot import hlo, pipelined_step
from deepseek_jax.aot.compiled import Program

HEAD = """HloModule m, is_scheduled=true

%both (a: f32[4], b: f32[4]) -> (f32[4], f32[4]) {
  %a = f32[4] parameter(0)
  %b = f32[4] parameter(1)
  %up = f32[4] negate(%a), metadata={op_name="body/even/forward/neg"}
  %down = f32[4] exponential(%b), metadata={op_name="body/even/backward/exp"}
  ROOT %pair = (f32[4], f32[4]) tuple(%up, %down)
}

ENTRY %body (x: f32[4], y: f32[4]) -> f32[4] {
  %x = f32[4] parameter(0)
  %y = f32[4] parameter(1)
  %zero = f32[] constant(0)
  %mask = f32[4] broadcast(%zero), metadata={op_name="body/even/backward/broadcast"}
  %f = f32[4] add(%x, %mask), metadata={op_name="body/even/forward/add"}
  %g = f32[4] multiply(%y, %mask), metadata={op_name="body/even/backward/mul"}
  %fence = (f32[4], f32[4]) tuple(%f, %g), metadata={op_name="body/even/optimization_barrier"}
  %f1 = f32[4] get-tuple-element(%fence), index=0
  %g1 = f32[4] get-tuple-element(%fence), index=1
  %fused = (f32[4], f32[4]) fusion(%f1, %g1), calls=%both
  %f2 = f32[4] get-tuple-element(%fused), index=0
  %g2 = f32[4] get-tuple-element(%fused), index=1
  %next = f32[4] negate(%g2), metadata={op_name="body/odd/forward/neg"}
"""
TAIL = "}\n"
WRONG = {
    "forward needs backward": (
        '  ROOT %h = f32[4] add(%f2, %g2), metadata={op_name="body/even/forward/add"}\n',
        [("h", "even/forward")],
    ),
    "backward needs forward, through something else": (
        "  %copy = f32[4] copy(%f2)\n"
        '  ROOT %h = f32[4] add(%copy, %g2), metadata={op_name="body/even/backward/add"}\n',
        [("h", "even/backward")],
    ),
    "another tick needs both": (
        '  ROOT %h = f32[4] add(%f2, %g2), metadata={op_name="body/odd/backward/add"}\n',
        [],
    ),
}


@pytest.mark.parametrize(("line", "found"), WRONG.values(), ids=WRONG)
def test_what_needs_what(line, found):
    """Constants, barriers and fusions of like operations create no dependence."""
    module = hlo.parse(HEAD + line + TAIL)
    program = Program(module, (), (), {}, 0)
    assert pipelined_step.dependences(program, module.entry) == found
