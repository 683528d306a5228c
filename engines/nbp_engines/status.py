"""The table of what was built and executed so far, and where. Help texts, bundles, reports and README quote it.

When something is executed for the first time, change its row here. All other texts are generated from the table.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

LEGEND = """\
The table lists what the maintainers executed; a receipt lists what your machine executed. An emulated GPU is host
memory behind the functions of CUDA and TensorRT (`tests/engines/emulated.py`): our calls are the real ones, and ONNX
Runtime computes the graphs on a CPU."""


class Answer(StrEnum):
    """A cell of the table."""

    YES = "yes"
    NO = "no"
    NOT_APPLICABLE = "not applicable"


YES, NO, NOT_APPLICABLE = Answer


@dataclass(frozen=True)
class Status:
    """One row of the table.

    Attributes:
        subject: a noun phrase that names what the row is about.
        built: whether it was built, if it needs to be built.
        on_cpu: whether it was executed on a CPU.
        on_emulated_gpu: whether it was executed on an emulated GPU.
        on_gpu: whether it was executed on a GPU.
        note: a sentence without its period that qualifies the answers; empty if none is needed.
    """

    subject: str
    built: Answer
    on_cpu: Answer
    on_emulated_gpu: Answer
    on_gpu: Answer
    note: str = ""


STATUS: Mapping[str, Status] = {
    "ort-cpu": Status("ONNX graphs in ONNX Runtime on a CPU", YES, YES, NOT_APPLICABLE, NOT_APPLICABLE),
    "ort-cuda": Status("ONNX graphs in ONNX Runtime's CUDA provider", YES, NOT_APPLICABLE, YES, NO),
    "tensorrt": Status(
        "the session that runs TensorRT engines",
        NOT_APPLICABLE,
        NOT_APPLICABLE,
        YES,
        NO,
        "the emulation runs the ONNX graphs in place of the engines",
    ),
    "tensorrt-rtx-engines": Status(
        "TensorRT-RTX engines", YES, NOT_APPLICABLE, NO, NO, "the machines that built them had no GPU"
    ),
    "tensorrt-11-engines": Status("TensorRT 11 engines", NO, NOT_APPLICABLE, NO, NO),
    "sample.cu": Status(
        "the sampling kernel `sample.cu`",
        YES,
        YES,
        YES,
        NO,
        "NVRTC compiled it; a CPU executed its source, thread for thread",
    ),
    "bf16": Status(
        "graphs in bf16",
        YES,
        NO,
        YES,
        NO,
        "a CPU executed the same graphs in fp32, on weights rounded to bf16",
    ),
    "torch-cpu": Status("the bench's PyTorch engines on a CPU", NOT_APPLICABLE, YES, NOT_APPLICABLE, NOT_APPLICABLE),
    "torch-cuda": Status(
        "the bench's PyTorch engines on CUDA (eager, cudagraph, compiled)",
        NOT_APPLICABLE,
        NOT_APPLICABLE,
        NO,
        NO,
        "tests execute their code on a CPU, without capturing CUDA graphs",
    ),
    "make-gpu": Status(
        "`make gpu`", NOT_APPLICABLE, YES, NOT_APPLICABLE, NO, "tests rehearse it on a CPU with `--device cpu`"
    ),
    "make-a100": Status("`make a100` and the Dockerfile", NO, NOT_APPLICABLE, NOT_APPLICABLE, NO),
}


def sentence(key: str) -> str:
    """Return one row as a sentence, such as "TensorRT 11 engines: never built, never executed."."""
    row = STATUS[key]
    places = {"on a CPU": row.on_cpu, "on an emulated GPU": row.on_emulated_gpu, "on a GPU": row.on_gpu}
    executed = [place for place, answer in places.items() if answer is YES]
    not_executed = [place for place, answer in places.items() if answer is NO]
    clauses = {YES: ["built"], NO: ["never built"]}.get(row.built, [])
    if executed:
        clauses.append(f"executed {' and '.join(executed)}")
        clauses += [f"never {' or '.join(not_executed)}"] if not_executed else []
    else:
        clauses.append("never executed")
    return _capitalised(f"{row.subject}: {', '.join(clauses)}{f' ({row.note})' if row.note else ''}.")


def sentences(keys: Iterable[str]) -> list[str]:
    """Return the sentences of some rows, without repetitions."""
    return [sentence(key) for key in dict.fromkeys(keys)]


def markdown() -> str:
    """Return the whole table and its legend in Markdown, for README."""
    return "\n".join([*_lines(), "", LEGEND, ""])


def _lines() -> Iterator[str]:
    yield "| What | Built | Executed on a CPU | Executed on an emulated GPU | Executed on a GPU | Note |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in STATUS.values():
        cells = (_capitalised(row.subject), row.built, row.on_cpu, row.on_emulated_gpu, row.on_gpu)
        yield f"| {' | '.join(cells)} | {_capitalised(row.note)} |"


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]
