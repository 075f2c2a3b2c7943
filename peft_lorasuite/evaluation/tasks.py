"""The fifteen benchmarks of the LoRASuite paper: names, local files, and datasets of the Hub.

`BENCHMARKS` is in the order of the paper's tables. Local files are those of the LLM-Adapters collection. Without them
the items come from the Hub: the task YAML has the dataset and one function of this module, which converts its rows to
items of the collection, so that both have the same prompts.

The functions are tested on rows of the documented form. Whether the Hub still has these datasets cannot be tested
without a network. Four of them differ from the collection in their items: AddSub and SingleEq (selected by Lila),
MAWPS (Calc-MAWPS, 520 items instead of 238) and gsm8k (another order). Use local files to compare with published
results.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LoraSuiteError, unknown_name_error
from ..text.templates import check_text
from . import answers

Item = dict[str, str]


@dataclass(frozen=True)
class Benchmark:
    """One test set.

    Attributes:
        name: Its name in the LLM-Adapters collection, also of its file.
        column: Its column in the papers' tables.
        suite: ``math`` or ``commonsense``.
        size: Number of items in the collection.
    """

    name: str
    column: str
    suite: str
    size: int

    @property
    def task(self) -> str:
        """Its name for lm-evaluation-harness."""
        return "lorasuite_" + _normalize_name(self.name)


BENCHMARKS = (
    Benchmark("AddSub", "AddSub", "math", 395),
    Benchmark("MultiArith", "MultiArith", "math", 600),
    Benchmark("SingleEq", "SingleEq", "math", 508),
    Benchmark("gsm8k", "GSM8K", "math", 1319),
    Benchmark("AQuA", "AQuA", "math", 254),
    Benchmark("mawps", "MAWPS", "math", 238),
    Benchmark("SVAMP", "SVAMP", "math", 1000),
    Benchmark("boolq", "BoolQ", "commonsense", 3270),
    Benchmark("piqa", "PIQA", "commonsense", 1838),
    Benchmark("social_i_qa", "SIQA", "commonsense", 1954),
    Benchmark("hellaswag", "HellaSwag", "commonsense", 10042),
    Benchmark("winogrande", "WinoG", "commonsense", 1267),
    Benchmark("ARC-Challenge", "ARC-c", "commonsense", 1172),
    Benchmark("ARC-Easy", "ARC-e", "commonsense", 2376),
    Benchmark("openbookqa", "OBQA", "commonsense", 500),
)
SUITES = ("math", "commonsense")


def _normalize_name(name: str) -> str:
    return name.strip().lower().replace("-", "_").removeprefix("lorasuite_")


def select(suite: str | Iterable[str]) -> tuple[Benchmark, ...]:
    """Return benchmarks in the order of the papers' tables.

    Args:
        suite: A suite, a comma-separated list or a sequence of names; names of the collection or of the papers'
            columns, in any case.

    Raises:
        LoraSuiteError: For an unknown name.
    """
    names = suite.split(",") if isinstance(suite, str) else list(suite)
    if not names:
        raise LoraSuiteError("no benchmark was given", where="suite")
    known = {key: {b} for b in BENCHMARKS for key in (_normalize_name(b.name), _normalize_name(b.column))}
    known |= {name: {b for b in BENCHMARKS if b.suite == name} for name in SUITES}
    wanted: set[Benchmark] = set()
    for name in names:
        if _normalize_name(name) not in known:
            raise unknown_name_error("benchmark", name, [*SUITES, *(b.name for b in BENCHMARKS)])
        wanted |= known[_normalize_name(name)]
    return tuple(b for b in BENCHMARKS if b in wanted)


def local_file(folder: Path, benchmark: Benchmark) -> Path | None:
    """Return a benchmark's file in a folder: ``NAME_test.json``, or ``NAME/test.json`` as in the collection."""
    paths = (folder / f"{benchmark.name}_test.json", folder / benchmark.name / "test.json")
    return next((path for path in paths if path.is_file()), None)


def read_items(path: Path, benchmark: Benchmark) -> list[Item]:
    """Read and check a file of the collection: a list of objects with ``instruction``, ``answer``, optional ``input``.

    Raises:
        LoraSuiteError: If the file is malformed, or an item cannot be scored.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise LoraSuiteError(f"not a JSON file: {error}", where=path) from error
    if not isinstance(rows, list) or not rows:
        raise LoraSuiteError("no items", where=path, wanted="a list of objects with instruction and answer")
    return [_check_item(row, benchmark, f"{path}, item {index}") for index, row in enumerate(rows)]


def _check_item(row: Any, benchmark: Benchmark, where: str) -> Item:
    if not isinstance(row, dict) or not isinstance(row.get("instruction"), str) or "answer" not in row:
        raise LoraSuiteError("malformed item", where=where, wanted="an object with instruction and answer")
    answer = row["answer"]
    # in the collection AQuA's letter is a list of one
    answer = str(answer[0] if isinstance(answer, list) and len(answer) == 1 else answer).strip()
    item = _item(row["instruction"], answer, row.get("input") or "")
    for name, text in item.items():
        check_text(text, f"{where}, {name}")
    if not _is_valid_answer(item, benchmark):
        raise LoraSuiteError(f"invalid answer for {benchmark.column}", where=where, got=repr(answer))
    return item


def _is_valid_answer(item: Item, benchmark: Benchmark) -> bool:
    if benchmark.suite == "commonsense":
        return item["answer"] in answers.choices(item)
    if benchmark.name == "AQuA":
        return item["answer"] in tuple("ABCDE")
    try:
        float(item["answer"])
    except ValueError:
        return False
    return True


def _item(instruction: str, answer: str, context: str = "") -> Item:
    return {"instruction": instruction, "input": context, "answer": answer}


def _from_hub(convert: Callable[[Mapping[str, Any]], Item]) -> Callable[[Any], Any]:
    """Turn a function of one row into one of a `datasets.Dataset`, as ``process_docs`` of the task YAML needs it."""

    def process_docs(dataset: Any) -> Any:
        from datasets import Features, Value

        # without features a column keeps its type: BoolQ's "false" would become the boolean True
        features = Features({name: Value("string") for name in ("instruction", "input", "answer")})
        return dataset.map(convert, remove_columns=dataset.column_names, features=features)

    process_docs.__doc__ = convert.__doc__
    return process_docs


def _enumerate(word: str, texts: Sequence[str], separator: str = " ") -> str:
    return separator.join(f"{word}{number}: {text}" for number, text in enumerate(texts, 1))


def _format(word: str, count: int) -> str:
    return "Answer format: " + "/".join(f"{word}{number}" for number in range(1, count + 1))


def _question(question: str, texts: Sequence[str], answer: int) -> Item:
    text = f"Please choose the correct answer to the question: {question}\n\n{_enumerate('Answer', texts)}\n\n"
    return _item(text + _format("answer", len(texts)), f"answer{answer + 1}")


@_from_hub
def boolq(row: Mapping[str, Any]) -> Item:
    """google/boolq: question, answer (a boolean); the passage is not shown, as in the collection."""
    text = f"Please answer the following question with true or false, question: {row['question']}?\n\n"
    return _item(text + "Answer format: true/false", str(row["answer"]).lower())


@_from_hub
def piqa(row: Mapping[str, Any]) -> Item:
    """baber/piqa: goal, sol1, sol2, label (0 or 1)."""
    texts = _enumerate("Solution", (row["sol1"], row["sol2"]), "\n\n")
    text = f"Please choose the correct solution to the question: {row['goal']}\n\n{texts}\n\n"
    return _item(text + _format("solution", 2), f"solution{int(row['label']) + 1}")


@_from_hub
def siqa(row: Mapping[str, Any]) -> Item:
    """lighteval/siqa: context, question, answerA to answerC, label ("1" to "3")."""
    texts = [row[f"answer{letter}"] for letter in "ABC"]
    return _question(f"{row['context']} {row['question']}", texts, int(row["label"]) - 1)


@_from_hub
def hellaswag(row: Mapping[str, Any]) -> Item:
    """Rowan/hellaswag: activity_label, ctx, endings, label ("0" to "3")."""
    text = f"Please choose the correct ending to complete the given sentence: {row['activity_label']}: {row['ctx']}\n\n"
    text += f"{_enumerate('Ending', row['endings'])}\n\n{_format('ending', len(row['endings']))}"
    return _item(text, f"ending{int(row['label']) + 1}")


@_from_hub
def winogrande(row: Mapping[str, Any]) -> Item:
    """allenai/winogrande: sentence, option1, option2, answer ("1" or "2")."""
    text = "Please choose the correct answer to fill in the blank to complete the given sentence: "
    text += f"{row['sentence']}\n\n{_enumerate('Option', (row['option1'], row['option2']))} {_format('option', 2)}"
    return _item(text, f"option{row['answer']}")


@_from_hub
def arc(row: Mapping[str, Any]) -> Item:
    """allenai/ai2_arc and allenai/openbookqa: question or question_stem, choices (text, label), answerKey."""
    question = row["question"] if "question" in row else row["question_stem"]
    return _question(question, row["choices"]["text"], row["choices"]["label"].index(row["answerKey"]))


@_from_hub
def gsm8k(row: Mapping[str, Any]) -> Item:
    """openai/gsm8k: question, answer (the solution, its number after "####")."""
    return _item(row["question"], row["answer"].rpartition("####")[2].strip().replace(",", ""))


@_from_hub
def svamp(row: Mapping[str, Any]) -> Item:
    """ChilleD/SVAMP: Body (with or without its full stop), Question, Answer."""
    return _item(f"{row['Body'].strip().rstrip('.')}. {row['Question'].strip()}", str(row["Answer"]))


@_from_hub
def multiarith(row: Mapping[str, Any]) -> Item:
    """ChilleD/MultiArith: question, final_ans."""
    return _item(row["question"], str(row["final_ans"]))


@_from_hub
def lila(row: Mapping[str, Any]) -> Item:
    """allenai/lila, configurations addsub and singleq: input, output_answer."""
    return _item(row["input"], str(row["output_answer"]))


@_from_hub
def mawps(row: Mapping[str, Any]) -> Item:
    """MU-NLPC/Calc-mawps: question, result_float."""
    return _item(row["question"], str(row["result_float"]))


@_from_hub
def aqua(row: Mapping[str, Any]) -> Item:
    """deepmind/aqua_rat: question, options ("A)21" ...), correct; brackets get the collection's spaces."""
    options = "".join(f"({text}" for text in row["options"]).replace("(", " (").replace(")", ") ")
    return _item(f"{row['question']} Answer Choices:{options}", row["correct"])
