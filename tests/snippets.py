"""Scheduled HLO written by hand: a mesh of node 2 x gpu 4, in every spelling that XLA uses."""

MESH = {"pipe": 1, "replica": 1, "node": 2, "gpu": 4, "tensor": 1}

STEP = """\
HloModule step, is_scheduled=true, num_partitions=8

FileNames
1 "step.py"

%fused (p.0: bf16[64,32], p.1: bf16[8,32,16], p.2: s32[]) -> bf16[64,16] {
  %p.0 = bf16[64,32]{1,0} parameter(0)
  %p.1 = bf16[8,32,16]{2,1,0} parameter(1)
  %p.2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %slice = bf16[1,32,16]{2,1,0} dynamic-slice(%p.1, %p.2, %zero, %zero), dynamic_slice_sizes={1,32,16}
  %flat = bf16[32,16]{1,0} bitcast(%slice)
  ROOT %dot = bf16[64,16]{1,0} dot(%p.0, %flat), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%wrapped (p.3: bf16[64,32]) -> bf16[64,32] {
  %p.3 = bf16[64,32]{1,0} parameter(0)
  ROOT %inner = bf16[64,32]{1,0} all-to-all(%p.3), channel_id=2, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
}

%body (state: (s32[], bf16[64,32], bf16[32,32])) -> (s32[], bf16[64,32], bf16[32,32]) {
  %state = (s32[], bf16[64,32]{1,0}, bf16[32,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = bf16[64,32]{1,0} get-tuple-element(%state), index=1
  %w = bf16[32,32]{1,0} get-tuple-element(%state), index=2
  %fast-start = ((bf16[64,32]{1,0}), bf16[64,32]{1,0:S(5)}) all-to-all-start(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}, metadata={op_name="jit(f)/all_to_all" scheduling_name="fast-start.7"}, backend_config={"collective_backend_config":{"is_sync":false}}
  %gemm = (bf16[64,32]{1,0}, s8[4194304]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[]}}}
  %fast-done = bf16[64,32]{1,0} all-to-all-done(%fast-start)
  ROOT %next = (s32[], bf16[64,32]{1,0}, bf16[32,32]{1,0}) tuple(%i, %fast-done, %w)
}

%condition (state.1: (s32[], bf16[64,32], bf16[32,32])) -> pred[] {
  %state.1 = (s32[], bf16[64,32]{1,0}, /*index=1*/bf16[32,32]{1,0}) parameter(0)
  ROOT %more = pred[] constant(true)
}

%short (b.0: bf16[64,32]) -> bf16[64,32] {
  ROOT %b.0 = bf16[64,32]{1,0} parameter(0)
}

%long (b.1: bf16[64,32]) -> bf16[64,32] {
  %b.1 = bf16[64,32]{1,0} parameter(0)
  ROOT %late = bf16[64,32]{1,0} negate(%b.1)
}

ENTRY %main (x.0: bf16[64,32], w.0: bf16[32,32], pool: bf16[8,32,16]) -> bf16[512,32] {
  %x.0 = bf16[64,32]{1,0} parameter(0)
  %w.0 = bf16[32,32]{1,0} parameter(1)
  %pool = bf16[8,32,16]{2,1,0} parameter(2)
  %step = s32[] constant(3)
  %slow = ((bf16[64,32]{1,0}), bf16[64,32]{1,0}) async-start(%x.0), calls=%wrapped, backend_config={"collective_backend_config":{"is_sync":false}}
  %first = bf16[64,32]{1,0} negate(%x.0)
  %triton = bf16[64,32]{1,0} custom-call(%first, %w.0), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(f)/my_kernel/pallas_call"}, backend_config={ir = "ML\\EF)(R\\22"}
  %slow.1 = ((bf16[64,32]{1,0}), bf16[64,32]{1,0}) async-update(%slow)
  %state.2 = (s32[], bf16[64,32]{1,0}, bf16[32,32]{1,0}) tuple(%step, %first, %w.0)
  %loop = (s32[], bf16[64,32]{1,0}, bf16[32,32]{1,0}) while(%state.2), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %slow.2 = bf16[64,32]{1,0} async-done(%slow.1)
  %product = bf16[64,16]{1,0} fusion(%slow.2, %pool, %step), kind=kCustom, calls=%fused
  %either = bf16[64,32]{1,0} conditional(%step, %slow.2, %slow.2), branch_computations={%short, %long}
  %shift-start = (bf16[64,32]{1,0}, bf16[64,32]{1,0}) collective-permute-start(%either), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}, backend_config={"collective_backend_config":{"is_sync":true}}
  %shift-done = bf16[64,32]{1,0} collective-permute-done(%shift-start)
  %big = bf16[64,32]{1,0} copy(%shift-done)
  ROOT %whole = bf16[512,32]{1,0} all-gather(%big), channel_id=3, replica_groups={}, dimensions={0}
}
"""  # noqa: E501
