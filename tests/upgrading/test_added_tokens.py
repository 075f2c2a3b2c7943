"""Tokens that were added for an adapter go with it, in every layout that PEFT saves (B5, B6 of the real inputs)."""

from __future__ import annotations

import added
import peft
import pytest
import torch
from added import LAYOUTS, TOKENS, Base, grown, identity_map, logits
from transformers import AutoTokenizer

from peft_lorasuite import PeftModel, upgrade

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def pair(request, tmp_path_factory) -> tuple[Base, Base, object]:
    """The same backbone twice, and the map."""
    home = tmp_path_factory.mktemp("pair")
    old, new = (added.base(home / side, tie_word_embeddings=request.param) for side in ("old", "new"))
    return old, new, identity_map(old, new)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", ["lorasuite", "copy"])
def test_b5_the_result_on_the_resized_backbone_computes_the_same(layout, method, pair, tmp_path):
    old, new, upgrade_map = pair
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
