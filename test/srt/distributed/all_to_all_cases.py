"""What the tests of all-to-all exchange: cases with the splits of every rank, and their memory."""

import random
from typing import NamedTuple

import torch

#: The sizes every machine tries, and all GPUs of this one.
WORLD_SIZES = sorted({2, 3, 4, 8} | ({torch.cuda.device_count()} - {0, 1}))

DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
]

POISON = 0xA5


class Case(NamedTuple):
    """One all-to-all: rows[i][j] rows of shape [..., *row] go from rank i to rank j."""

    rows: list[list[int]]
    row: tuple[int, ...]
    dtype: torch.dtype
    explicit: bool  # split sizes are passed, not left to None
    seed: int

    def send_sizes(self, rank: int) -> list[int]:
        return self.rows[rank]

    def receive_sizes(self, rank: int) -> list[int]:
        return [sent[rank] for sent in self.rows]

    def splits(self, rank: int) -> dict[str, list[int]]:
        if not self.explicit:
            return {}
        return {
            "output_split_sizes": self.receive_sizes(rank),
            "input_split_sizes": self.send_sizes(rank),
        }

    def chunks(self, rank: int, salt: int = 0) -> list[torch.Tensor]:
        """What ``rank`` sends, one tensor per receiver: random bit patterns, NaNs among them."""
        generator = torch.Generator().manual_seed(hash((self.seed, rank, salt)) % 2**31)
        chunks = []
        for rows in self.send_sizes(rank):
            shape = (rows, *self.row)
            count = torch.Size(shape).numel() * self.dtype.itemsize
            data = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
            if self.dtype is torch.bool:
                data &= 1
            chunks.append(data.view(self.dtype).view(shape))
        return chunks

    def expected(self, rank: int, salt: int = 0) -> torch.Tensor:
        """The definition: chunk i of the output is what rank i sends here."""
        return torch.cat([self.chunks(peer, salt)[rank] for peer in range(len(self.rows))])


def generate_case(rng: random.Random, world_size: int) -> Case:
    kind = rng.choice(["even", "even, explicit", "uneven", "sparse"])
    if kind.startswith("even"):
        rows = [[rng.randint(0, 5)] * world_size] * world_size
    else:
        weights = (1, 1) if kind == "uneven" else (5, 1)
        rows = [
            [rng.choices((0, rng.randint(1, 6)), weights)[0] for _ in range(world_size)]
            for _ in range(world_size)
        ]
    row = tuple(rng.choice((0, 1, 2, 3, 5, 8)) for _ in range(rng.randint(0, 4)))
    return Case(rows, row, rng.choice(DTYPES), kind != "even", rng.randrange(2**31))


def cases(world_size: int) -> list[Case]:
    """Every dtype, the corners by hand, and generated ones."""
    everyone = range(world_size)
    corners = [
        [[int(i == 0) * 3 for _ in everyone] for i in everyone],  # one sender
        [[int(j == 1) * 3 for j in everyone] for _ in everyone],  # one receiver
        [[int(j == (i + 1) % world_size) for j in everyone] for i in everyone],  # a ring
        [[int(i == j) * 2 for j in everyone] for i in everyone],  # everyone to itself
        [[i * world_size + j for j in everyone] for i in everyone],  # all sizes differ
        [[0 for _ in everyone] for _ in everyone],  # nothing at all
    ]
    even = [[2] * world_size] * world_size
    rng = random.Random(world_size)
    return [
        *(Case(even, (3, 5), dtype, False, 1) for dtype in DTYPES),
        *(Case(rows, (2, 3), torch.bfloat16, True, 2) for rows in corners),
        Case([[0] * world_size] * world_size, (4, 2), torch.bfloat16, False, 3),
        Case(even, (0, 4), torch.float32, False, 4),
        Case(even, (), torch.uint8, False, 5),
        Case([[100_003] * world_size] * world_size, (), torch.uint8, False, 6),
        *(generate_case(rng, world_size) for _ in range(40)),
    ]


class Buffers:
    """Input and output of a rank for a case, each between guards that must stay as they are."""

    def __init__(self, case: Case, rank: int, device: torch.device | str = "cpu") -> None:
        self.case, self.rank = case, rank
        self.input, _ = self._guarded(sum(case.send_sizes(rank)), device)
        self.output, self._output_memory = self._guarded(sum(case.receive_sizes(rank)), device)
        self.fill()

    def _guarded(self, rows: int, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
        shape = torch.Size((rows, *self.case.row))
        # An odd number of elements: nothing may rely on the alignment of an allocation.
        memory = torch.empty(shape.numel() + 14, dtype=self.case.dtype, device=device)
        return memory[7:-7].view(shape), memory

    def fill(self, salt: int = 0) -> None:
        """New contents for the input, and an output that no exchange has touched."""
        self.input.copy_(torch.cat(self.case.chunks(self.rank, salt)))
        self._output_memory.view(torch.uint8).fill_(POISON)

    def check(self, salt: int = 0) -> None:
        expected = self.case.expected(self.rank, salt)
        output, memory = self.output.cpu(), self._output_memory.cpu()
        assert torch.equal(_bits(output), _bits(expected)), f"{self.case} on rank {self.rank}"
        assert torch.equal(
            _bits(self.input.cpu()), _bits(torch.cat(self.case.chunks(self.rank, salt)))
        )
        for guard in (memory[:7], memory[-7:]):
            assert (_bits(guard) == POISON).all(), f"{self.case}: rank {self.rank} wrote outside"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
