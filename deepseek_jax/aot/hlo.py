"""Parser of XLA's text of a scheduled module, as far as schedule, traffic and memory need it.

In a scheduled module (`compiled.as_text()`) a device starts the instructions of a computation in
the order of its lines.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

FP8 = "f8e4m3fn"  # XLA's name of E4M3
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier", "after-all",
    "partition-id", "replica-id",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Array:
    """Type and shape of one leaf of a result.

    Attributes:
      dtype: XLA's name of the type, such as "bf16" or "f8e4m3fn".
      shape: Sizes.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size in memory."""
        bits = re.search(r"\d+", self.dtype)  # pred has no number and takes a byte
        return -(-self.elements * (int(bits.group()) if bits else 8) // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """Instruction, one line of the text.

    Attributes:
      name: Name in its computation.
      opcode: Operation, such as "fusion".
      arrays: Leaves of the result, those of a tuple in order.
      operands: Names of instructions in the same computation.
      attributes: Rest of the line, unparsed.
      root: True if its result is that of the computation.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def bytes(self) -> int:
        """Size of the result."""
        return sum(array.bytes for array in self.arrays)

    @property
    def target(self) -> str:
        """Target of a custom call; empty for other instructions."""
        return self._find(r'custom_call_target="([^"]*)"') if self.opcode == "custom-call" else ""

    @property
    def op_name(self) -> str:
        """Operation of the Python program that the instruction comes from."""
        return self._find(r'op_name="([^"]*)"')

    @property
    def scheduling_name(self) -> str:
        """Name in the scheduler and in a cost profile."""
        return self._find(r'scheduling_name="([^"]*)"') or self.name

    @property
    def calls(self) -> tuple[str, ...]:
        """Computations that the instruction runs, without those of one element (`to_apply`)."""
        if self.opcode == "custom-call":
            return ()
        keys = r"(?:calls|body|condition|(?:true|false)_computation)"
        keys += r"|to_apply" if self.opcode == "call" else ""
        head = self.attributes.partition(", metadata=")[0]
        names = re.findall(rf"(?:{keys})=%([\w.\-]+)", head)
        branches = re.search(r"branch_computations=\{([^}]*)\}", head)
        return (*names, *re.findall(r"%([\w.\-]+)", branches.group(1) if branches else ""))

    @property
    def applied(self) -> str:
        """Computation of one element that a reduction, scatter or collective applies, or empty."""
        return self._find(r"to_apply=%([\w.\-]+)") if self.opcode != "call" else ""

    @property
    def unique(self) -> bool:
        """True for a scatter that is told to write no place twice."""
        return "unique_indices=true" in self.attributes

    @property
    def index(self) -> int:
        """Index of the element that a get-tuple-element takes, or of a parameter's argument."""
        return int(self._find(r"^(\d+)\)" if self.opcode == "parameter" else r"index=(\d+)"))

    @property
    def body(self) -> str:
        """Computation that a loop repeats."""
        return self._find(r"body=%([\w.\-]+)")

    @property
    def trips(self) -> int | None:
        """Number of trips of a loop; None if the compiler does not know it."""
        found = self._find(r'"known_trip_count":\{"n":"(\d+)"')
        return int(found) if found else None

    def dimensions(self, key: str) -> tuple[int, ...]:
        """Numbers of a list attribute, spelt `key={1,2}` or `"key":["1","2"]`."""
        found = self._find(rf'\b{key}"?(?:=|:\s*)[{{\[]([^}}\]]*)[}}\]]')
        return tuple(int(number) for number in re.findall(r"\d+", found))

    def _find(self, pattern: str) -> str:
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else ""


Computation = Mapping[str, Instruction]  # by name, in schedule order


@dataclasses.dataclass(frozen=True)
class Module:
    """Parsed module.

    Attributes:
      computations: Name -> computation; callees before callers.
      entry: Name of the computation that a run starts with.
    """

    computations: Mapping[str, Computation]
    entry: str

    def inputs(self, computation: str, instruction: Instruction) -> tuple[Array, ...]:
        """Arrays of the operands of an instruction of this computation."""
        known = self.computations[computation]
        return tuple(array for name in instruction.operands for array in known[name].arrays)


SUMS = {
    "reduce", "reduce-window", "select-and-scatter", "scatter", "all-reduce", "all-reduce-start",
    "reduce-scatter", "reduce-scatter-start",
}  # fmt: skip


def sums(module: Module) -> Iterator[tuple[Instruction, str]]:
    """Yields reductions, scatters and collectives that add floats, with the type of their sums.

    It is the narrowest type of the computation that adds two numbers, because a backend may add in
    a wider one and round each sum: its arrays are then wide too.
    """
    for computation in module.computations.values():
        for line in computation.values():
            if line.opcode not in SUMS or not line.applied:
                continue
            applied = module.computations[line.applied].values()
            types = {array.dtype for each in applied for array in each.arrays}
            floats = [t for t in types if re.match(r"bf\d|f\d", t)]
            if floats and any(each.opcode == "add" for each in applied):
                yield line, min(floats, key=lambda t: Array(t, ()).bytes)


def parse(text: str) -> Module:
    """Parses the text of a module.

    Raises:
      ValueError: The text is not that of a scheduled module.
    """
    if "is_scheduled=true" not in text.partition("\n")[0]:
        raise ValueError("the text is not of a scheduled HLO module; pass compiled.as_text()")
    computations: dict[str, dict[str, Instruction]] = {}
    entry, here = "", {}
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line):
            here = computations[head.group(2)] = {}
            entry = head.group(2) if head.group(1) else entry
        elif match := re.match(r"\s+(ROOT )?%([\w.\-]+) = (.*)$", line):
            here[match.group(2)] = _instruction(match.group(2), match.group(3), bool(match[1]))
    return Module(computations, entry)


def _instruction(name: str, line: str, root: bool) -> Instruction:
    shape, rest = _balanced(line) if line.startswith("(") else line.split(" ", 1)
    opcode, _, rest = rest.strip().partition("(")
    inside, attributes = (
        ("", rest) if opcode in ("constant", "parameter") else _balanced("(" + rest)
    )
    arrays = re.findall(r"([a-z]\w*)\[([\d,<=]*)\]", shape)
    return Instruction(
        name=name,
        opcode=opcode,
        arrays=tuple(Array(t, _sizes(s)) for t, s in arrays if t != "token"),
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        attributes=attributes,
        root=root,
    )


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in re.findall(r"\d+", text))


def _balanced(text: str) -> tuple[str, str]:
    """Splits text after the parenthesis that closes the first one."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return text[: position + 1], text[position + 1 :]
    raise ValueError(f"unbalanced parentheses in HLO: {text[:80]!r}")


_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[((?:'\w+'=\d+,?)+)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{((?:'\w+',?)+)\}"
)
_LISTS = re.compile(r"(replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")


def groups(instruction: Instruction, devices: int) -> np.ndarray:
    """Groups of devices that exchange with each other: a row per group, of positions in the mesh.

    Three spellings are known: lists; `mesh['a'=2,'b'=4] {'b'}`, the groups along b; and
    `[g,n]<=[dims]T(permutation)`, which is
    `arange(prod(dims)).reshape(dims).transpose(permutation).reshape(g, n)`. A mesh may give the
    order of its devices in the same way, `device_ids=([dims]T(permutation))`. Every pair (source,
    target) of a permute is a group.

    Raises:
      ValueError: Another spelling.
    """
    text = instruction.attributes.partition(", metadata=")[0]
    if iota := _IOTA.search(text):
        return _ordered(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2]))
    if named := _MESH.search(text):
        names = re.findall(r"'(\w+)'=", named[1])
        along = [names.index(name) for name in re.findall(r"'(\w+)'", named[4])]
        others = [axis for axis in range(len(names)) if axis not in along]
        sizes = tuple(int(size) for size in re.findall(r"=(\d+)", named[1]))
        last = math.prod(sizes[axis] for axis in along)
        order = _ordered(named[2], named[3]) if named[2] else _counted(sizes)
        return order.reshape(sizes).transpose(*others, *along).reshape(-1, last)
    lists = _LISTS.search(text)
    if lists and lists[2]:
        return np.array([_sizes(group) for group in re.findall(r"\{([\d,]*)\}", lists[2])])
    if "replica_groups=" in text and not lists:
        raise ValueError(f"unknown replica groups of {instruction.name}: {text[:120]!r}")
    if lists and lists[1] == "source_target_pairs":
        return np.zeros((1, 1), int)  # a permute without a pair sends nothing
    return _counted((1, devices))


def _ordered(dims: str, permutation: str | None) -> np.ndarray:
    order = _counted(_sizes(dims))
    return order.transpose(_sizes(permutation)) if permutation else order


def _counted(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(math.prod(shape)).reshape(shape)
