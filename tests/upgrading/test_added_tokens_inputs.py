"""Added tokens in the inputs and outputs around an upgrade: other adapter types, models in memory, later commands."""

from __future__ import annotations

import json

import added
import peft
import pytest
import torch
from added import TOKENS, Base, grown, identity_map, logits
from pico import pico_tokenizer, save_backbone
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from peft_lorasuite import PeftModel, UpgradeMap, finetune, upgrade
from peft_lorasuite.cli import chat_session
from peft_lorasuite.cli.main import main
from peft_lorasuite.evaluation.harness import evaluate

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SMALL = {"transplant": {"extra": 50, "length": 4}, "distill": {"extra": 50, "length": 4, "epochs": 1}}
EXAMPLES = [{"instruction": prompt, "output": "the cat<end_tool>"} for prompt in added.PROMPTS]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def pair(request, tmp_path_factory) -> tuple[Base, Base, UpgradeMap]:
    home = tmp_path_factory.mktemp("pair")
    old, new = (added.base(home / side, tie_word_embeddings=request.param) for side in ("old", "new"))
    return old, new, identity_map(old, new)


def close(new_model, tokenizer, tuned) -> None:
    torch.testing.assert_close(logits(new_model, tokenizer), logits(tuned, tokenizer), atol=2e-3, rtol=2e-3)


OTHER_TYPES = {
    "DoRA": peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    "LoHa": peft.LoHaConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    "IA3": peft.IA3Config(
        target_modules=["k_proj", "v_proj"], feedforward_modules=["v_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "method"), [*((kind, "lorasuite") for kind in OTHER_TYPES), ("LoHa", "transplant")])
def test_b5_other_adapter_types(kind, method, pair, tmp_path):
    old, new, upgrade_map = pair
    tuned = added.train_with(tmp_path / "adapter", old, OTHER_TYPES[kind])
    made = upgrade(
        tmp_path / "adapter", upgrade_map, method=method, options=SMALL.get(method), old=old.folder, new=new.folder,
        prompts=added.PROMPTS, rank=16 if kind != "DoRA" else None,
    )  # fmt: skip
    made.save(tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(new.model(len(made.tokenizer)), tmp_path / "out").eval()
    if method == "lorasuite":
        close(loaded, made.tokenizer, tuned)
    assert made.report.facts["added_tokens"]["added"] == TOKENS


@pytest.mark.parametrize(
    ("layout", "method"),
    [("modules_to_save", "lorasuite"), ("save_embedding_layers", "transplant"), ("LoRA of both tables", "distill")],
)
def test_b5_models_of_the_caller_are_not_changed(layout, method, pair, tmp_path):
    old, new, upgrade_map = pair
    added.train(tmp_path / "adapter", old, layout)
    models = [one.model() for one in (old, new)]
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    tables = [model.get_input_embeddings() for model in models]
    upgrade(
        tmp_path / "adapter", upgrade_map, method=method, options=SMALL.get(method), old=models[0], new=models[1],
        prompts=added.PROMPTS,
    )  # fmt: skip
    for model, values, table in zip(models, before, tables, strict=True):
        assert {name: value.shape for name, value in model.state_dict().items()} == {
            name: value.shape for name, value in values.items()
        }
        assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
        assert model.get_input_embeddings() is table
        assert table.num_embeddings == model.config.vocab_size == len(table.weight) == old.rows
        tied = model.config.tie_word_embeddings
        assert (model.get_output_embeddings().weight is table.weight) == tied


def test_b5_tokens_that_the_new_backbone_knows_are_matched_by_text(pair, tmp_path):
    old, _, _ = pair
    tokenizer, ids = grown(old.tokenizer, TOKENS[::-1])  # in another order
    new = Base(save_backbone(tmp_path / "new", old.model(len(tokenizer)), tokenizer), len(tokenizer), tokenizer)
    tuned = added.train(tmp_path / "adapter", old, "modules_to_save")
    made = upgrade(tmp_path / "adapter", identity_map(old, new), method="lorasuite", old=old.folder, new=new.folder)
    facts = made.report.facts["added_tokens"]
    assert (facts["matched"], facts["added"], made.tokenizer) == (sorted(TOKENS), [], None)
    made.save(tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(new.model(), tmp_path / "out").eval()
    order = [*range(old.rows), *ids[::-1]]
    wanted = logits(tuned, grown(old.tokenizer)[0])
    torch.testing.assert_close(logits(loaded, tokenizer)[..., order], wanted, atol=2e-3, rtol=2e-3)


def test_b5_unchanged_tables_are_not_written(pair, tmp_path):
    old, new, upgrade_map = pair
    added.train(tmp_path / "adapter", old, "save_embedding_layers")
    made = upgrade(tmp_path / "adapter", upgrade_map, method="lorasuite", old=old.folder, new=new.folder)
    made.save(tmp_path / "out")
    tables = {name: value.shape for name, value in load_file(tmp_path / "out/adapter_model.safetensors").items()
              if "lora_" not in name}  # fmt: skip
    assert tables
    assert all(shape == (len(TOKENS), 32) for shape in tables.values())


def test_b5_a_table_of_the_backbone_without_added_tokens_is_not_written(pair, tmp_path):
    old, new, upgrade_map = pair
    torch.manual_seed(0)
    model = peft.get_peft_model(old.model(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    for method in ("lorasuite", "transplant"):
        made = upgrade(
            tmp_path / "adapter", upgrade_map, method=method, options=SMALL.get(method), old=old.folder,
            new=new.folder, prompts=["the cat sat on", "the dog ran to"] * 4,
        )  # fmt: skip
        made.save(tmp_path / method)
        assert all("lora_" in name for name in load_file(tmp_path / method / "adapter_model.safetensors"))


def test_b5_without_saved_rows_or_a_tokenizer_the_tokens_are_named_as_lost(pair, tmp_path):
    old, new, upgrade_map = pair
    added.train(tmp_path / "adapter", old, "save_embedding_layers")
    path = tmp_path / "adapter/adapter_model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if "lora_" in name}
    save_file(kept, path)
    for method in ("lorasuite", "transplant"):
        made = upgrade(
            tmp_path / "adapter", upgrade_map, method=method, options=SMALL.get(method), old=old.folder,
            new=new.folder, prompts=["the cat sat on", "the dog ran to"] * 4,
        )  # fmt: skip
        assert set(made.report.facts["added_tokens"]["lost"]) == set(TOKENS)
        assert "'<tool>', '<end_tool>'" in " ".join(made.report.facts["hints"])
        assert made.tokenizer is None


def test_b5_later_commands_take_the_result(pair, tmp_path, capsys):
    """`chat`, `evaluate` and `finetune` resize the backbone and use the tokenizer in the adapter's folder."""
    old, new, upgrade_map = pair
    tuned = added.train(tmp_path / "adapter", old, "modules_to_save")
    upgrade_map.save(tmp_path / "map")
    call = ["upgrade", tmp_path / "adapter", "--from", old.folder, "--to", new.folder, "--map", tmp_path / "map"]
    assert main([str(one) for one in [*call, "--method", "lorasuite", "-o", tmp_path / "out"]]) == 0
    assert (
        "added to the new tokenizer, which is saved with the adapter: '<tool>', '<end_tool>'" in capsys.readouterr().out
    )
    models = chat_session.load_models(new.folder, str(tmp_path / "out"), old_base=old.folder,
                                      old_adapter=str(tmp_path / "adapter"))  # fmt: skip
    answers = chat_session.ask(models, "<tool> the cat", length=6)
    assert answers["upgraded"] == answers["old + adapter"]
    item = {"instruction": "The <tool> cat? Answer format: true/false", "input": "", "output": "", "answer": "true"}
    (tmp_path / "boolq_test.json").write_text(json.dumps([item, item]))
    for base, adapter in ((new, "out"), (old, "adapter")):
        settings = {"suite": "boolq", "data": tmp_path, "scoring": "likelihood"}
        assert evaluate(str(base.folder), adapter=str(tmp_path / adapter), **settings).tasks[0].n == 2
    model = finetune(str(tmp_path / "out"), EXAMPLES, base=new.folder, epochs=1, output=tmp_path / "tuned")
    again = peft.PeftModel.from_pretrained(new.model(old.rows + 2), tmp_path / "tuned").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tuned")
    assert tokenizer.convert_tokens_to_ids(TOKENS) == grown(new.tokenizer)[1]
    close(again, tokenizer, model)
    assert (logits(model, tokenizer) - logits(tuned, tokenizer)).abs().max() > 1e-2


@pytest.mark.parametrize("layout", ["modules_to_save", "trainable_token_indices", "LoRA of both tables"])
def test_b5_a_result_in_memory_is_trained_and_saved_with_its_tokens(layout, pair, tmp_path):
    old, new, upgrade_map = pair
    added.train(tmp_path / "adapter", old, layout)
    model = PeftModel.from_upgraded(
        new.model(), tmp_path / "adapter", source_model=old.folder, upgrade_map=upgrade_map, method="lorasuite",
        is_trainable=True,
    )  # fmt: skip
    finetune(model, EXAMPLES, epochs=1, output=tmp_path / "tuned")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tuned")
    loaded = peft.PeftModel.from_pretrained(new.model(len(tokenizer)), tmp_path / "tuned").eval()
    close(loaded, tokenizer, model)


def test_b5_a_tokenizer_of_another_backbone_is_not_used(pair, tmp_path, caplog):
    old, new, upgrade_map = pair
    added.train_with(tmp_path / "adapter", old, added.plain_lora(), rows=old.rows, grow=False)
    pico_tokenizer(["zebra", "quick", "jumps"]).save_pretrained(tmp_path / "adapter")
    made = upgrade(tmp_path / "adapter", upgrade_map, method="lorasuite", old=old.folder, new=new.folder)
    assert "added_tokens" not in made.report.facts
    assert "is not that of its backbone, and is not used" in caplog.text


def test_b6_adapters_of_trained_tokens_alone(pair, tmp_path):
    old, new, upgrade_map = pair
    ids = grown(old.tokenizer)[1]
    config = peft.TrainableTokensConfig(token_indices=ids, target_modules=["embed_tokens"])
    tuned = added.train_with(tmp_path / "adapter", old, config)
    for method in ("lorasuite", "transplant"):
        made = upgrade(
            tmp_path / "adapter", upgrade_map, method=method, options=SMALL.get(method), old=old.folder,
            new=new.folder, prompts=added.PROMPTS,
        )  # fmt: skip
        made.save(tmp_path / method)
        loaded = peft.PeftModel.from_pretrained(new.model(len(made.tokenizer)), tmp_path / method).eval()
        close(loaded, made.tokenizer, tuned)


def test_b6_the_ids_of_trained_tokens_are_checked(pair, tmp_path):
    old, new, upgrade_map = pair
    added.train(tmp_path / "adapter", old, "trainable_token_indices")
    path = tmp_path / "adapter/adapter_config.json"
    config = json.loads(path.read_text())
    config["trainable_token_indices"] = [10**9, 10**9 + 1]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="malformed trainable_token_indices"):
        upgrade(tmp_path / "adapter", upgrade_map, method="lorasuite", old=old.folder, new=new.folder)
