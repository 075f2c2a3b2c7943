"""The benchmarks' names and files, the Hub's rows in the collection's form, and the task YAML against the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peft_lorasuite.errors import LoraSuiteError
from peft_lorasuite.evaluation import tasks as items

BOOLQ = items.select("boolq")[0]


@pytest.mark.parametrize(
    ("suite", "columns"),
    [
        ("math", "AddSub MultiArith SingleEq GSM8K AQuA MAWPS SVAMP"),
        ("commonsense", "BoolQ PIQA SIQA HellaSwag WinoG ARC-c ARC-e OBQA"),
        ("obqa, ARC-Easy,boolq,BoolQ", "BoolQ ARC-e OBQA"),
        (["arc_challenge", "svamp"], "SVAMP ARC-c"),
        ("lorasuite_mawps", "MAWPS"),
    ],
)
def test_a_suite_is_found_by_any_of_its_names_in_the_tables_order(suite: Any, columns: str) -> None:
    assert " ".join(b.column for b in items.select(suite)) == columns


@pytest.mark.parametrize("suite", ["mmlu", "boolq,", "", []])
def test_an_unknown_suite_is_an_error(suite: Any) -> None:
    with pytest.raises(LoraSuiteError, match="benchmark"):
        items.select(suite)


def test_files_are_found_under_both_names(tmp_path: Path) -> None:
    assert items.local_file(tmp_path, BOOLQ) is None
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "test.json").write_text("[]")
    assert items.local_file(tmp_path, BOOLQ) == tmp_path / "boolq" / "test.json"
    (tmp_path / "boolq_test.json").write_text("[]")
    assert items.local_file(tmp_path, BOOLQ) == tmp_path / "boolq_test.json"


def read(tmp_path: Path, content: Any, name: str = "boolq") -> list[dict[str, str]]:
    path = tmp_path / "file.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return items.read_items(path, items.select(name)[0])


def test_items_are_read_whatever_the_form_of_the_answer(tmp_path: Path) -> None:
    row = {"instruction": "Even? Answer format: true/false", "output": "the correct answer is true", "answer": "true"}
    assert read(tmp_path, [row]) == [{"instruction": row["instruction"], "input": "", "answer": "true"}]
    row = {"instruction": "2 + 2?", "input": None, "answer": 4.0}
    assert read(tmp_path, [row], "AddSub") == [{"instruction": "2 + 2?", "input": "", "answer": "4.0"}]
    row = {"instruction": "2 + 2? Answer Choices: (A) 4", "input": "x", "answer": ["A"]}
    assert read(tmp_path, [row], "AQuA") == [{"instruction": row["instruction"], "input": "x", "answer": "A"}]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("{", "boolq", "not a JSON file"),
        ([], "boolq", "no items"),
        ({"data": []}, "boolq", "no items"),
        ([{"question": "?"}], "boolq", "item 0: malformed item"),
        (
            [{"instruction": "Even? Answer format: true/false", "answer": "yes"}],
            "boolq",
            "for BoolQ .got 'yes'",
        ),
        ([{"instruction": "Even?", "answer": "true"}], "boolq", "has no options"),
        (
            [{"instruction": "1?", "answer": "1"}, {"instruction": "2?", "answer": "two"}],
            "gsm8k",
            "item 1: invalid answer",
        ),
        ([{"instruction": "1?", "answer": "F"}], "AQuA", "invalid answer for AQuA"),
    ],
)
def test_a_file_that_cannot_be_scored_is_an_error(tmp_path: Path, content: Any, name: str, message: str) -> None:
    with pytest.raises(LoraSuiteError, match=message):
        read(tmp_path, content, name)


CHOICES = {"text": ["iron", "wood", "salt"], "label": ["A", "B", "C"]}
THREE = "Answer format: answer1/answer2/answer3"
QUESTION = "Please choose the correct answer to the question: "
HUB_ROWS = [
    (
        "boolq",
        {"question": "is ice solid", "answer": True, "passage": "Ice ..."},
        "Please answer the following question with true or false, question: is ice solid?\n\nAnswer format: true/false",
        "true",
    ),
    (
        "piqa",
        {"goal": "To dry a cup,", "sol1": "wipe it.", "sol2": "fill it.", "label": 0},
        "Please choose the correct solution to the question: To dry a cup,\n\nSolution1: wipe it.\n\n"
        "Solution2: fill it.\n\nAnswer format: solution1/solution2",
        "solution1",
    ),
    (
        "siqa",
        {
            "context": "Kim fell.",
            "question": "Why?",
            "answerA": "ice",
            "answerB": "joy",
            "answerC": "tea",
            "label": "1",
        },
        f"{QUESTION}Kim fell. Why?\n\nAnswer1: ice Answer2: joy Answer3: tea\n\nAnswer format: answer1/answer2/answer3",
        "answer1",
    ),
    (
        "hellaswag",
        {"activity_label": "Rowing", "ctx": "A man sits. he", "endings": ["rows.", "is.", "a.", "b."], "label": "3"},
        "Please choose the correct ending to complete the given sentence: Rowing: A man sits. he\n\nEnding1: rows. "
        "Ending2: is. Ending3: a. Ending4: b.\n\nAnswer format: ending1/ending2/ending3/ending4",
        "ending4",
    ),
    (
        "winogrande",
        {"sentence": "Ann thanked Eve as _ had helped.", "option1": "Ann", "option2": "Eve", "answer": "2"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: Ann thanked Eve as _ "
        "had helped.\n\nOption1: Ann Option2: Eve Answer format: option1/option2",
        "option2",
    ),
    (
        "arc",
        {"id": "1", "question": "Which rusts?", "choices": CHOICES, "answerKey": "A"},
        f"{QUESTION}Which rusts?\n\nAnswer1: iron Answer2: wood Answer3: salt\n\n{THREE}",
        "answer1",
    ),
    (
        "arc",
        {"question_stem": "Which burns?", "choices": CHOICES, "answerKey": "B"},
        f"{QUESTION}Which burns?\n\nAnswer1: iron Answer2: wood Answer3: salt\n\n{THREE}",
        "answer2",
    ),
    ("gsm8k", {"question": "1000 + 1?", "answer": "It is <<1000+1=1001>>.\n#### 1,001"}, "1000 + 1?", "1001"),
    ("svamp", {"Body": "A pen costs 2", "Question": "Two pens?", "Answer": 4.0}, "A pen costs 2. Two pens?", "4.0"),
    ("svamp", {"Body": "A pen costs 2. ", "Question": "One?", "Answer": 2.0}, "A pen costs 2. One?", "2.0"),
    ("multiarith", {"question": " 3 + 4?", "final_ans": "7"}, " 3 + 4?", "7"),
    ("lila", {"input": "3 + 5?", "output_program": "print(8)", "output_answer": "8.0"}, "3 + 5?", "8.0"),
    ("mawps", {"id": "m", "question": "3 + 6?", "result": "9", "result_float": 9.0}, "3 + 6?", "9.0"),
    (
        "aqua",
        {"question": "y twice?", "options": ["A)2y", "B)y/(2x)", "C)none"], "rationale": "...", "correct": "A"},
        "y twice? Answer Choices: (A) 2y (B) y/ (2x)  (C) none",
        "A",
    ),
]


@pytest.mark.parametrize(("function", "row", "instruction", "answer"), HUB_ROWS)
def test_a_row_of_the_hub_becomes_an_item_of_the_collection(
    function: str, row: dict, instruction: str, answer: str
) -> None:
    datasets = pytest.importorskip("datasets")
    dataset = getattr(items, function)(datasets.Dataset.from_list([row]))
    assert list(dataset) == [{"instruction": instruction, "input": "", "answer": answer}]


def test_the_task_files_agree_with_the_table() -> None:
    yaml_loader = pytest.importorskip("lm_eval.tasks")
    folder = Path(items.__file__).parents[1] / "data" / "tasks"
    index = yaml_loader.TaskManager(include_path=str(folder), include_defaults=False).task_index
    assert set(index) == {b.task for b in items.BENCHMARKS} | {f"lorasuite_{suite}" for suite in items.SUITES}
    for suite in items.SUITES:
        assert index[f"lorasuite_{suite}"].cfg["task"] == [b.task for b in items.select(suite)]
    covered = {index[b.task].cfg["process_docs"].rpartition(".")[2] for b in items.BENCHMARKS}
    assert covered == {function for function, *_ in HUB_ROWS}
    for b in items.BENCHMARKS:
        config = index[b.task].cfg
        scorer = config["process_results"].rpartition(".")[2]
        assert config["task_alias"] == b.column
        assert scorer == {"commonsense": "score_option"}.get(
            b.suite, "score_letter" if b.name == "AQuA" else "score_number"
        )
        assert config["generation_kwargs"]["max_gen_toks"] == {"math": 256, "commonsense": 32}[b.suite]
        assert callable(getattr(items, config["process_docs"].rpartition(".")[2]))
