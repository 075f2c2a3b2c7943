"""Tokens that were added for an adapter go with it, in every layout that PEFT saves (B5, B6 of the real inputs)."""

from __future__ import annotations

import added
import peft
import pytest
import torch
from added import LAYOUTS, TOKENS, Base, grown, identity_map, logits
from transformers import AutoTokenizer
from versions import needs

from peft_lorasuite import Backbone, PeftModel, upgrade

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def pair(request, tmp_path_factory) -> tuple[Base, Base, object]:
    """The same backbone twice, and the map."""
    home = tmp_path_factory.mktemp("pair")
    old, new = (added.base(home / side, tie_word_embeddings=request.param) for side in ("old", "new"))
    return old, new, identity_map(old, new)


@pytest.mark.parametrize(
    ("layout", "method"), [*((layout, "lorasuite") for layout in LAYOUTS), ("modules_to_save", "copy")]
)
def test_b5_the_result_on_the_resized_backbone_computes_the_same(layout, method, pair, tmp_path):
    old, new, upgrade_map = pair
    if layout.endswith("by table") and old.model().config.tie_word_embeddings:
        needs("peft", "0.19", "trainable_token_indices of both tables of a tied backbone")
    tuned = added.train(tmp_path / "adapter", old, layout)
    made = upgrade(tmp_path / "adapter", upgrade_map, method=method, old=old.folder, new=new.folder)
    made.save(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids(TOKENS) == grown(new.tokenizer)[1]
    loaded = peft.PeftModel.from_pretrained(new.model(len(tokenizer)), tmp_path / "out").eval()
    wanted = logits(tuned, tokenizer)
    torch.testing.assert_close(logits(loaded, tokenizer), wanted, atol=2e-3, rtol=2e-3)
    assert made.report.facts["added_tokens"]["added"] == TOKENS
    attached = PeftModel.from_upgraded(
        new.folder, tmp_path / "adapter", source_model=old.folder, upgrade_map=upgrade_map, method=method
    )
    torch.testing.assert_close(logits(attached, attached.adapter_tokenizer), wanted, atol=2e-3, rtol=2e-3)


SMALL = {"transplant": {"extra": 50, "length": 4}, "distill": {"extra": 50, "length": 4, "epochs": 1}}


@torch.no_grad()
def rows_of(model, table: str, ids: list[int]) -> torch.Tensor:
    """Rows of a token table as the model uses them, with its adapter."""
    if table == "embedding":
        return model.get_input_embeddings()(torch.tensor(ids))
    return model.get_output_embeddings()(torch.eye(model.config.hidden_size))[:, ids].T


@pytest.mark.parametrize(
    ("layout", "method"),
    [
        ("modules_to_save", "cross-lora"), ("modules_to_save", "transplant"), ("LoRA of both tables", "transplant"),
        ("trainable_token_indices", "transplant"), ("LoRA of both tables", "distill"),
    ],
)  # fmt: skip
def test_b5_every_method_keeps_the_rows_of_the_added_tokens(layout, method, pair, tmp_path):
    old, new, upgrade_map = pair
    tuned = added.train(tmp_path / "adapter", old, layout)
    made = upgrade(
        tmp_path / "adapter", upgrade_map, method=method, options=SMALL.get(method), old=old.folder, new=new.folder,
        prompts=added.PROMPTS,
    )  # fmt: skip
    made.save(tmp_path / "out")
    tokenizer, ids = grown(new.tokenizer)
    loaded = peft.PeftModel.from_pretrained(new.model(len(tokenizer)), tmp_path / "out").eval()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids(TOKENS) == ids
    follows = method in SMALL and new.model().config.tie_word_embeddings  # its rows are written for both tables at once
    for table in ("embedding", "head"):
        wanted = rows_of(tuned, "embedding" if follows else table, ids)
        torch.testing.assert_close(rows_of(loaded, table, ids), wanted, atol=1e-4, rtol=1e-3, msg=table)


@pytest.mark.parametrize("layout", ["modules_to_save", "LoRA of both tables", "save_embedding_layers"])
def test_b5_behavior_of_an_unrelated_pair(layout, tmp_path):
    """The new backbone is of another family and size, and its vocabulary is padded."""
    old = added.base(tmp_path / "old")
    new = added.base(tmp_path / "new", "qwen2", padding=7, seed=2, hidden_size=48, intermediate_size=64)
    added.train(tmp_path / "adapter", old, layout)
    made = upgrade(
        tmp_path / "adapter", identity_map(old, new), method="transplant", options=SMALL["transplant"], old=old.folder,
        new=new.folder, prompts=added.PROMPTS,
    )  # fmt: skip
    made.save(tmp_path / "out")
    assert made.report.facts["added_tokens"]["added"] == TOKENS
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(new.model(len(tokenizer)), tmp_path / "out").eval()
    assert torch.isfinite(logits(loaded, tokenizer)).all()


@pytest.mark.parametrize("layout", ["modules_to_save", "trainable_token_indices", "LoRA of both tables"])
@pytest.mark.parametrize("rows", [None, 128], ids=["in the padding", "multiple of 64"])
def test_b5_padded_vocabularies(layout, rows, tmp_path):
    """Rows without a token are no tokens; a new table with enough rows is not resized."""
    old, new = (added.base(tmp_path / side, padding=9) for side in ("old", "new"))
    tuned = added.train(tmp_path / "adapter", old, layout, rows=rows or old.rows)
    upgrade_map = identity_map(old, new)
    made = upgrade(tmp_path / "adapter", upgrade_map, method="lorasuite", old=old.folder, new=new.folder)
    made.save(tmp_path / "out")
    facts = made.report.facts["added_tokens"]
    assert facts["added"] == TOKENS
    assert facts["lost"] == {}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert facts["rows"] is None
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(loaded, tokenizer), logits(tuned, tokenizer), atol=2e-3, rtol=2e-3)


FAMILIES = {"gpt2": {}, "gemma2": {}, "phi": {}, "gpt_neox": {}, "granite": {"tie_word_embeddings": True}, "qwen3": {}}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["modules_to_save", "save_embedding_layers"])
def test_b5_families(layout, family, tmp_path):
    """Heads with a bias, scaled embeddings, and other names of the tables."""
    old, new = (added.base(tmp_path / side, family, **FAMILIES[family]) for side in ("old", "new"))
    arch = Backbone.open(old.folder).arch
    names = {"embed_tokens": arch.embedding.rpartition(".")[2], "lm_head": arch.head.rpartition(".")[2]}
    values = (
        {"target_modules": "all-linear"}
        if layout != "modules_to_save"
        else {"target_modules": "all-linear", "modules_to_save": list(names.values())}
    )
    tuned = added.train(tmp_path / "adapter", old, layout, **values)
    made = upgrade(tmp_path / "adapter", identity_map(old, new), method="lorasuite", old=old.folder, new=new.folder)
    made.save(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(new.model(len(tokenizer)), tmp_path / "out").eval()
    torch.testing.assert_close(logits(loaded, tokenizer), logits(tuned, tokenizer), atol=5e-3, rtol=5e-3)


def test_b5_an_embedding_behind_a_norm_loses_the_tokens_by_name(tmp_path):
    old, new = (added.base(tmp_path / side, "bloom") for side in ("old", "new"))
    added.train(tmp_path / "adapter", old, "save_embedding_layers", target_modules="all-linear")
    made = upgrade(tmp_path / "adapter", identity_map(old, new), method="lorasuite", old=old.folder, new=new.folder)
    assert set(made.report.facts["added_tokens"]["lost"]) == set(TOKENS)
    assert "'<tool>', '<end_tool>' (the embedding is followed by a norm" in " ".join(made.report.facts["hints"])
    assert made.tokenizer is None
