"""Real runs of lm-evaluation-harness on models whose every answer is known.

The model is a Llama that says one sentence: attention and MLP are switched off, embeddings are unit vectors, and the
head leads from each word to the next. So every outcome is known beforehand.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from peft_lorasuite.cli.main import main
from peft_lorasuite.errors import LoraSuiteError
from peft_lorasuite.evaluation.harness import _load_tasks, compare, evaluate
from peft_lorasuite.evaluation.tasks import BENCHMARKS, read_items, select

torch = pytest.importorskip("torch")
pytest.importorskip("lm_eval")

# PEFT 0.21 reads a property that transformers 5.23 has deprecated; nothing here can avoid it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

END = "</s>"
WORDS = "the correct answer is true false answer1 answer2 answer3 so 3 + 4 = 7. ### Instruction: 9 A: Response: (B)"
TRUTHS = [True, False, True, True, False]
RIGHT = [1, 2, 2, 3]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: place for place, word in enumerate(["<unk>", END, *WORDS.split()])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token=END)


@pytest.fixture(scope="module")
def speaker(tokenizer: Any) -> Callable[[str], Any]:
    """A function from a sentence, begun by the prompt's last word, to a model that goes on with it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(sentence: str) -> Any:
        size = 64
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=size, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=1024, tie_word_embeddings=False,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        words = tokenizer.convert_tokens_to_ids([*sentence.split(), END])
        with torch.no_grad():
            model.model.layers[0].self_attn.o_proj.weight.zero_()
            model.model.layers[0].mlp.down_proj.weight.zero_()
            model.model.embed_tokens.weight.copy_(torch.eye(len(tokenizer), size))
            model.lm_head.weight.zero_()
            for word, following in pairwise(words):
                model.lm_head.weight[following, word] = 1.0
        return model

    return build


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few items of every benchmark: five for BoolQ, four with options, two with numbers."""
    folder = tmp_path_factory.mktemp("data")
    for b in BENCHMARKS:
        kind = {"piqa": "solution", "hellaswag": "ending", "winogrande": "option"}.get(b.name, "answer")
        if b.name == "boolq":
            rows = [(f"question {i}? Answer format: true/false", str(t).lower()) for i, t in enumerate(TRUTHS)]
        elif b.suite == "commonsense":
            options = "/".join(f"{kind}{place}" for place in (1, 2, 3))
            rows = [(f"question {i}? Answer format: {options}", f"{kind}{right}") for i, right in enumerate(RIGHT)]
        else:
            rows = [("3 + 4?", "B" if b.name == "AQuA" else "7.0"), ("3 + 5?", "C" if b.name == "AQuA" else "8")]
        content = [{"instruction": text, "input": "", "output": "", "answer": answer} for text, answer in rows]
        (folder / f"{b.name}_test.json").write_text(json.dumps(content))
    return folder


def test_commonsense_is_scored_by_the_option_that_was_generated(speaker: Any, tokenizer: Any, data: Path) -> None:
    model = speaker("Response: the correct answer is answer2")
    model.train()
    found = evaluate(model, tokenizer=tokenizer, data=data)
    assert [score.task for score in found.tasks] == [b.name for b in select("commonsense")]
    by_name = {score.task: (score.outcomes, score.answered) for score in found.tasks}
    for task in ("social_i_qa", "ARC-Challenge", "ARC-Easy", "openbookqa"):
        assert by_name[task] == ((0, 1, 1, 0), 1.0)
    assert by_name["piqa"] == by_name["hellaswag"] == by_name["winogrande"] == ((0, 0, 0, 0), 0.0)
    assert by_name["boolq"] == ((0,) * 5, 0.0)
    assert found.average == pytest.approx(4 * 0.5 / 8)
    assert model.training  # left as it was
    assert tokenizer.pad_token is None


def test_math_is_scored_by_the_last_number_of_the_item_itself(speaker: Any, tokenizer: Any, data: Path) -> None:
    goes_on = speaker("Response: so 3 + 4 = 7. ### Instruction: 9")
    found = evaluate(goes_on, tokenizer=tokenizer, suite="math", data=data)
    outcomes = {score.task: score.outcomes for score in found.tasks}
    assert outcomes.pop("AQuA") == (0, 0)
    assert set(outcomes.values()) == {(1, 0)}
    says_letter = speaker("Response: so (B)")
    assert evaluate(says_letter, tokenizer=tokenizer, suite="AQuA", data=data)["AQuA"].outcomes == (1, 0)


def test_an_answer_that_is_cut_off_does_not_count(speaker: Any, tokenizer: Any, data: Path) -> None:
    model = speaker("Response: so 3 + 4 = 7.")
    found = evaluate(model, tokenizer=tokenizer, suite="gsm8k", data=data, max_new_tokens=4)
    assert (found["gsm8k"].outcomes, found.settings["max_new_tokens"]) == ((0, 0), 4)


def test_the_harness_asks_through_the_chat_template(speaker: Any, tokenizer: Any, data: Path) -> None:
    """The prompt then ends as the template ends it, and the system prompt is what the template gets."""
    chatty = copy.deepcopy(tokenizer)
    end = "{{ 'answer' if messages[0]['role'] == 'system' else 'A:' }}"
    chatty.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}" + end
    kwargs = {"tokenizer": chatty, "suite": "boolq", "data": data}
    assert evaluate(speaker("A: true"), **kwargs).average == 0
    found = evaluate(speaker("A: true"), **kwargs, apply_chat_template=True)
    assert found.average == pytest.approx(0.6)
    assert found.settings["apply_chat_template"] is True
    asked = {"apply_chat_template": True, "system_instruction": "the"}
    assert evaluate(speaker("A: true"), **kwargs, **asked).average == 0
    assert evaluate(speaker("answer true"), **kwargs, **asked).average == pytest.approx(0.6)
    with pytest.raises(LoraSuiteError, match="the tokenizer has no chat template"):
        evaluate(speaker("A: true"), tokenizer=tokenizer, suite="boolq", data=data, apply_chat_template=True)
    with pytest.raises(
        LoraSuiteError, match="fewshot_as_multiturn: few-shot examples are turns only with a chat template"
    ):
        evaluate(speaker("A: true"), **kwargs, fewshot_as_multiturn=True)


def test_a_template_of_ones_own_replaces_the_prompt(speaker: Any, tokenizer: Any, data: Path) -> None:
    model = speaker("A: true")
    kwargs = {"tokenizer": tokenizer, "suite": "boolq", "data": data}
    assert evaluate(model, **kwargs).average == 0
    assert evaluate(model, **kwargs, template="{instruction} A:").average == pytest.approx(0.6)
    likely = evaluate(model, **kwargs, template="{instruction} A: so", scoring="likelihood")
    assert likely["boolq"].answered is None


def test_likelihood_finds_what_a_model_without_the_format_knows(speaker: Any, tokenizer: Any, data: Path) -> None:
    model = speaker("is answer3")  # generates nothing, but after "the correct answer is" prefers answer3
    kwargs = {"tokenizer": tokenizer, "suite": "ARC-e,OBQA", "data": data}
    assert evaluate(model, **kwargs).average == 0
    assert [s.outcomes for s in evaluate(model, **kwargs, scoring="likelihood").tasks] == [(0, 0, 0, 1)] * 2


def test_a_limit_draws_the_same_items_for_every_model(speaker: Any, tokenizer: Any, data: Path) -> None:
    yes, no = (speaker(f"Response: the correct answer is {word}") for word in ("true", "false"))
    kwargs = {"tokenizer": tokenizer, "suite": "boolq,siqa", "data": data, "limit": 3}
    one, other = evaluate(yes, **kwargs), evaluate(no, **kwargs)
    assert [score.n for score in one.tasks] == [3, 3]
    found = compare(one, other)
    assert (found.tasks[0].wins + found.tasks[0].losses, found.tasks[1].wins) == (3, 0)
    alone = evaluate(yes, **{**kwargs, "suite": "boolq"})
    assert alone["boolq"] == one["boolq"]
    draws = {evaluate(yes, **kwargs, seed=seed)["boolq"].items for seed in range(4)}
    assert len(draws) > 1
    assert evaluate(yes, **{**kwargs, "limit": 99})["boolq"].n == 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, speaker: Any, tokenizer: Any) -> tuple[Path, Path]:
    """A base that says true, and an adapter of rank 1 on the head that makes it false."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base, adapter = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    speaker("Response: the correct answer is true").save_pretrained(base)
    tokenizer.save_pretrained(base)
    config = LoraConfig(r=1, lora_alpha=1, target_modules=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    head = model.base_model.model.lm_head
    where, true, false = tokenizer.convert_tokens_to_ids(["is", "true", "false"])
    with torch.no_grad():
        head.lora_A["default"].weight.zero_()[0, where] = 1.0
        head.lora_B["default"].weight[false, 0], head.lora_B["default"].weight[true, 0] = 2.0, -2.0
    model.save_pretrained(adapter, save_embedding_layers=False)
    return base, adapter


def test_models_and_adapters_are_loaded_by_name(folders: tuple[Path, Path], data: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, adapter = folders
    kwargs = {"suite": "boolq", "data": data}
    plain = evaluate(str(base), **kwargs)
    assert (plain["boolq"].outcomes, plain.model, plain.adapter) == (tuple(map(float, TRUTHS)), str(base), None)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    adapted = [
        evaluate(base, adapter=adapter, **kwargs),
        evaluate(adapter, **kwargs),  # which names its base
        evaluate(loaded, **kwargs),  # whose tokenizer is where the base came from
        evaluate(loaded, tokenizer=str(base), **kwargs),
    ]
    assert adapted[0].adapter == str(adapter)
    for one in adapted:
        found = compare(one, plain).average
        assert (found.wins, found.losses, found.value) == (2, 3, pytest.approx(-0.2))


def test_the_command_compares_adapters_and_others_beside_published_rows(
    folders: tuple[Path, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = map(str, folders)
    call = ["evaluate", base, "--suite", "commonsense", "--data", str(data), "--limit", "2", "-q", "-o"]
    known = [*call, str(tmp_path / "a"), "--adapter", adapter, "--published", "minicpm-s-1b->minicpm-2b"]
    assert main(known) == 0
    assert capsys.readouterr() == ("", "")  # neither bars nor the harness's notes
    table = (tmp_path / "a" / "table.md").read_text()
    assert f"{adapter} against base:" in table
    assert "MiniCPM-2B, LoRASuite w LFT (100) *(published)*" in table
    words = [*call, str(tmp_path / "b")]
    words[1] = adapter  # an adapter that names its backbone, against that backbone
    assert main([*words, "--against", base]) == 0
    table = (tmp_path / "b" / "table.md").read_text()
    assert f"{adapter} against {base}:" in table
    assert "| Won |" in table
    assert main([*call, str(tmp_path / "c"), "--published", "Nobody -> Nothing"]) == 1
    assert "unknown published pair" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_the_task_files_read_rows_of_the_hub(tmp_path: Path, data: Path) -> None:
    """As for the Hub, with its rows in a local file in place of the download."""
    rows = [{"question": f"is {i} even", "answer": i % 2 == 0, "passage": "..."} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"data_files": {"validation": str(tmp_path / "rows.jsonl")}, "split": {"test": "validation"}}
    instead = {"dataset_path": "json", "dataset_kwargs": {**source, "cache_dir": str(tmp_path)}}
    task = _load_tasks(select("boolq"), instead, None, None, tmp_path)["lorasuite_boolq"]
    form = "Please answer the following question with true or false, question: is {}?\n\nAnswer format: true/false"
    expected = [(form.format(f"{i} even"), str(i % 2 == 0).lower()) for i in range(3)]
    assert [(doc["instruction"], doc["answer"]) for doc in task.eval_docs] == expected
    assert task.doc_to_text(task.eval_docs[0]).endswith("### Response:\n")
    assert set(task.eval_docs[0]) == set(read_items(data / "boolq_test.json", select("boolq")[0])[0])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"suite": "mmlu"}, "unknown benchmark 'mmlu'"),
        ({"scoring": "chain"}, "unknown scoring .got 'chain', wanted generate or likelihood"),
        (
            {"suite": "gsm8k,boolq", "scoring": "likelihood"},
            "gsm8k: the math benchmarks have no options .* use scoring='generate'",
        ),
        ({"limit": 0}, "limit: must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens: must be at least 1"),
        ({"template": "Q:"}, "template: the prompt template has no"),
        (
            {"data": "nowhere"},
            "nowhere: the folder has no boolq_test.json, piqa_test.json, .*limit suite to the benchmarks",
        ),
        ({"adapter": "somewhere"}, "adapter needs a folder or Hub id as model"),
        ({"tokenizer": None}, "pass tokenizer"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_runs(
    speaker: Any, tokenizer: Any, data: Path, kwargs: dict, message: str
) -> None:
    with pytest.raises(LoraSuiteError, match=message):
        evaluate(speaker("is true"), **{"tokenizer": tokenizer, "data": data, **kwargs})


def test_a_missing_harness_is_said_with_its_remedy(monkeypatch: pytest.MonkeyPatch, speaker: Any, data: Path) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(LoraSuiteError, match=r"pip install peft-lorasuite\[evaluate\]"):
        evaluate(speaker("is true"), data=data)


def test_nothing_heavy_is_imported_and_no_network_is_a_plain_error() -> None:
    code = (
        "import os, sys; os.environ['HF_HUB_OFFLINE'] = '1'\n"
        "from pathlib import Path\n"
        "from peft_lorasuite.evaluation.harness import _load_tasks\n"
        "from peft_lorasuite.evaluation.tasks import select\n"
        "assert not {'torch', 'lm_eval', 'transformers', 'datasets', 'peft'} & set(sys.modules)\n"
        "try: _load_tasks(select('boolq'), {}, None, None, Path())\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "the items could not be downloaded from the Hub" in done.stdout
    assert "pass a folder with the files as data" in done.stdout
