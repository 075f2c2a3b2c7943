"""The loopback Hub, proved with the real client: what the later tests of push and pull stand on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import hub_fixtures
import pytest
from hub_fixtures import ADAPTER, WEIGHTS, ask_client
from hub_server import HubServer

from peft_lorasuite.compat import has, missing_file_error

hub = hub_fixtures.hub

PUSH = """
api.create_repo("me/new-lora")
api.create_repo("me/new-lora", exist_ok=True)
folder = Path(FOLDER)
first = api.upload_folder(repo_id="me/new-lora", folder_path=folder, commit_message="first")
again = api.upload_folder(repo_id="me/new-lora", folder_path=folder, commit_message="nothing new")
api.create_branch("me/new-lora", branch="r8")
api.upload_file(repo_id="me/new-lora", path_in_repo="sub/note.txt", path_or_fileobj=b"on r8", revision="r8")
pull = api.upload_file(repo_id="me/new-lora", path_in_repo="fix.txt", path_or_fileobj=b"fix", create_pr=True)
theirs = api.upload_file(repo_id="org/other", path_in_repo="fix.txt", path_or_fileobj=b"fix", create_pr=True)
api.create_tag("me/new-lora", tag="v1")
api.delete_file("README.md", repo_id="me/new-lora", revision="r8")
info = api.model_info("me/new-lora", files_metadata=True)
weights = next(s for s in info.siblings if s.rfilename == "adapter_model.safetensors")
refs = api.list_repo_refs("me/new-lora", include_pull_requests=True)
def stale():
    api.upload_file(repo_id="me/new-lora", path_in_repo="a", path_or_fileobj=b"a", parent_commit="0" * 40)
def bad_card():
    api.upload_file(repo_id="me/new-lora", path_in_repo="README.md", path_or_fileobj=b"---\\na: [\\n---\\n")
def not_mine():
    api.upload_file(repo_id="org/other", path_in_repo="a", path_or_fileobj=b"a")
print(json.dumps({
    "who": api.whoami()["name"], "repo": first.repo_url.repo_id, "no_op": first.oid == again.oid,
    "pull": [pull.pr_revision, pull.pr_num, theirs.pr_num], "sha": info.sha, "base": info.card_data.base_model,
    "tags": info.tags, "lfs": [weights.size, weights.lfs.sha256], "config": info.config,
    "refs": [r.ref for r in [*refs.branches, *refs.tags, *refs.pull_requests]],
    "tree": [e.path for e in api.list_repo_tree("me/new-lora", revision="r8", recursive=True)],
    "top": [e.path for e in api.list_repo_tree("me/new-lora", revision="r8")],
    "paths": [e.path for e in api.get_paths_info("me/new-lora", ["sub", "absent", ".gitattributes"], revision="r8")],
    "commits": [c.title for c in api.list_repo_commits("me/new-lora", revision="r8")],
    "author": [m.id for m in api.list_models(author="org")],
    "filter": [m.id for m in api.list_models(filter="base_model:adapter:org/base")],
    "limit": len(list(api.list_models(limit=1))),
    "exists": [api.repo_exists("me/new-lora"), api.file_exists("me/new-lora", "absent"),
               api.revision_exists("me/new-lora", "r8"), api.revision_exists("me/new-lora", "r9")],
    "stale": attempt(stale), "bad_card": attempt(bad_card), "not_mine": attempt(not_mine),
    "not_my_org": attempt(lambda: api.create_repo("org/new")),
    "delete": attempt(lambda: api.delete_repo("me/gone")),
}))
"""


def folder_of(files: dict[str, bytes], folder: Path) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_push_branch_pull_request_and_listing(hub: HubServer, tmp_path: Path) -> None:
    hub.api.page_size = 2  # the lists below take several pages
    for number in range(3):
        hub.add_repo(f"org/lora-{number}", ADAPTER)
    hub.add_repo("org/other", {"config.json": b"{}"})
    hub.add_repo("org/secret", ADAPTER, private=True)
    hub.add_repo("me/gone", {})
    folder = folder_of(ADAPTER, tmp_path / "adapter")
    info = ask_client(hub, PUSH, tmp_path / "home", {"FOLDER": str(folder)})
    files = hub.files("me/new-lora")
    assert {name: files[name] for name in ADAPTER} == ADAPTER
    assert set(files) == {".gitattributes", *ADAPTER}
    assert hub.history("me/new-lora") == ["first", "initial commit"]
    assert hub.files("me/new-lora", "r8")["sub/note.txt"] == b"on r8"
    assert hub.files("me/new-lora", "refs/pr/1") == files | {"fix.txt": b"fix"}
    assert "fix.txt" not in hub.files("org/other")
    assert "me/gone" not in hub.api.repos
    assert hub.bytes_sent("adapter_model") == 0
    assert len(hub.requests(r"^PUT /cdn/upload/me/new-lora/")) == 1
    assert not [r for r in hub.log if r.status == 501]
    adapters = [f"org/lora-{number}" for number in range(3)]
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    assert info == {
        "who": "me",
        "repo": "me/new-lora",
        "no_op": True,
        "pull": ["refs/pr/1", 1, 1],
        "sha": hub.api.repos["me/new-lora"].at("main").oid,
        "base": "org/base",
        "tags": ["peft", "lora", "safetensors", "base_model:org/base", "base_model:adapter:org/base"],
        "lfs": [len(WEIGHTS), digest],
        "config": {"peft": {"base_model_name_or_path": "org/base", "task_type": None}},
        "refs": ["refs/heads/main", "refs/heads/r8", "refs/tags/v1", "refs/pr/1"],
        "tree": ["sub", ".gitattributes", "adapter_config.json", "adapter_model.safetensors", "sub/note.txt"],
        "top": ["sub", ".gitattributes", "adapter_config.json", "adapter_model.safetensors"],
        "paths": ["sub", ".gitattributes"],
        "commits": ["Delete README.md with huggingface_hub", "Upload sub/note.txt with huggingface_hub", "first",
                    "initial commit"],
        "author": [*adapters, "org/other"],
        "filter": [*adapters, "me/new-lora"],
        "limit": 1,
        "exists": [True, False, True, False],
        "stale": "HfHubHTTPError",
        "bad_card": "ValueError",
        "not_mine": "HfHubHTTPError",
        "not_my_org": "HfHubHTTPError",
        "delete": "ok",
    }  # fmt: skip


PULL = """
one = Path(hf_hub_download("me/lora", "adapter_config.json"))
hf_hub_download("me/lora", "adapter_config.json")
missing = attempt(lambda: hf_hub_download("me/lora", "absent.json"))
folder = Path(snapshot_download("me/lora", ignore_patterns="*.md"))
pinned = Path(hf_hub_download("me/lora", "adapter_model.safetensors", revision=OLD))
print(json.dumps({"same": one.parent == folder, "files": sorted(p.name for p in folder.iterdir()),
                  "missing": missing, "size": (folder / "adapter_model.safetensors").stat().st_size,
                  "old": pinned.read_bytes().decode(), "snapshot": folder.name}))
"""


def test_each_byte_is_fetched_once_and_the_token_stays_with_the_hub(hub: HubServer, tmp_path: Path) -> None:
    old = hub.add_repo("me/lora", {"adapter_model.safetensors": b"old"})
    new = hub.add_repo("me/lora", ADAPTER)
    home = tmp_path / "home"
    info = ask_client(hub, PULL, home, {"OLD": old})
    kept = ["adapter_config.json", "adapter_model.safetensors"]
    assert info == {
        "same": True, "files": kept, "missing": missing_file_error().__name__, "size": len(WEIGHTS), "old": "old",
        "snapshot": new,
    }  # fmt: skip
    assert hub.bytes_sent("^GET .*adapter_config") == len(ADAPTER["adapter_config.json"])
    assert hub.bytes_sent(r"^GET .*\.safetensors$") == len(WEIGHTS) + len(b"old")
    assert hub.bytes_sent("README") == 0
    store = hub.requests("/cdn/")
    assert len(store) == 2
    assert not any(request.authorized for request in store)
    assert all(request.authorized for request in hub.requests("/resolve/"))
    hub.log.clear()
    ask_client(hub, PULL, home, {"OLD": old})
    assert {request.method for request in hub.requests(r"/resolve/.*adapter_config")} == {"HEAD"}
    assert hub.bytes_sent("^GET .*(/resolve/|/cdn/)") == 0


ACCESS = """
names = ["org/gated", "org/open-gate", "org/secret", "org/absent", "me/mine"]
print(json.dumps({who: {name: attempt(lambda: hf_hub_download(name, "adapter_config.json", token=token,
                                                                     cache_dir=f"{CACHE}/{who}"))
                        for name in names} for who, token in TOKENS.items()}
    | {"info": {name: attempt(lambda: api.model_info(name)) for name in names},
       "revision": [attempt(lambda: hf_hub_download("me/mine", "README.md", revision="r9")),
                    attempt(lambda: snapshot_download("me/mine", revision="r9")),
                    attempt(lambda: api.model_info("me/mine", revision="0" * 40))],
       "revoked_whoami": attempt(lambda: api.whoami(token=TOKENS["revoked"]))}))
"""


def test_gates_private_repositories_and_revoked_tokens(hub: HubServer, tmp_path: Path) -> None:
    for name in ("org/gated", "org/open-gate"):
        hub.add_repo(name, ADAPTER, gated=True)
    hub.grant("org/open-gate")
    hub.add_repo("org/secret", ADAPTER, private=True)
    hub.add_repo("me/mine", ADAPTER, private=True)
    revoked, other = hub.add_user("ex"), hub.add_user("boss", orgs=("org",))
    hub.revoke(revoked)
    tokens = {"me": hub.token, "boss": other, "nobody": False, "revoked": revoked}
    info = ask_client(hub, ACCESS, tmp_path, {"TOKENS": tokens, "CACHE": str(tmp_path / "caches")})
    absent, gated = "RepositoryNotFoundError", "GatedRepoError"
    names = ["org/gated", "org/open-gate", "org/secret", "org/absent", "me/mine"]
    assert info["me"] == dict(zip(names, [gated, "ok", absent, absent, "ok"], strict=True))
    assert info["boss"] == dict(zip(names, ["ok", "ok", "ok", absent, absent], strict=True))
    assert info["nobody"] == dict(zip(names, [gated, gated, absent, absent, absent], strict=True))
    assert info["revoked"] == dict.fromkeys(names, "HfHubHTTPError")
    assert info["revoked_whoami"] == ("HfHubHTTPError" if has("huggingface-hub", "1.0") else "HTTPError")
    assert info["info"] == dict.fromkeys(info["me"], "ok") | {"org/secret": absent, "org/absent": absent}
    assert info["revision"] == ["RevisionNotFoundError"] * 3


LOADERS = """
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast)
torch.manual_seed(0)
words = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "hub": 2}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                     num_key_value_heads=1)
base = LlamaForCausalLM(config)
base.save_pretrained(FOLDER + "/base", max_shard_size="1KB")
PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(FOLDER + "/base")
api.create_repo("me/base")
api.upload_folder(repo_id="me/base", folder_path=FOLDER + "/base")
lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
base.config._name_or_path = base.name_or_path = "me/base"
tuned = get_peft_model(base, lora).eval()
tuned.save_pretrained(FOLDER + "/lora")
api.create_repo("me/lora")
api.upload_folder(repo_id="me/lora", folder_path=FOLDER + "/lora")
tokens = AutoTokenizer.from_pretrained("me/base")("the hub", return_tensors="pt")["input_ids"]
loaded = AutoModelForCausalLM.from_pretrained("me/base")
adapted = PeftModel.from_pretrained(loaded, "me/lora").eval()
auto = AutoPeftModelForCausalLM.from_pretrained("me/lora").eval()
with torch.no_grad():
    wanted, got, same = (m(tokens).logits for m in (tuned, adapted, auto))
print(json.dumps({"tokens": tokens.tolist(), "layers": AutoConfig.from_pretrained("me/base").num_hidden_layers,
                  "equal": [torch.equal(wanted, got), torch.equal(wanted, same)]}))
"""


def test_transformers_and_peft_load_from_it(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    info = ask_client(hub, LOADERS, tmp_path / "home", {"FOLDER": str(tmp_path / "models")})
    assert info == {"tokens": [[1, 2]], "layers": 2, "equal": [True, True]}
    names = set(hub.files("me/base"))
    assert "model.safetensors.index.json" in names
    shards = [name for name in names if name.endswith(".safetensors")]
    assert len(hub.requests(r"^GET /cdn/me/base/.*\.safetensors$")) == len(shards) > 1
    adapter = hub.files("me/lora")["adapter_model.safetensors"]
    assert hub.bytes_sent("^GET /cdn/me/lora/") == len(adapter)
    assert [r.path for r in hub.log if r.status == 501] == []


def test_on_the_wire(hub: HubServer) -> None:
    hub.add_repo("me/lora", ADAPTER)
    address = f"{hub.url}/me/lora/resolve/main/adapter_config.json"
    with urlopen(Request(address, headers={"Range": "bytes=1-4"})) as answer:
        config = ADAPTER["adapter_config.json"]
        assert (answer.status, answer.read()) == (206, config[1:5])
        assert answer.headers["Content-Range"] == f"bytes 1-4/{len(config)}"
        assert answer.headers["ETag"] == f'"{hashlib.sha1(b"blob %d%c" % (len(config), 0) + config).hexdigest()}"'
    for path in ("/api/no-such-thing", "/cdn/me/lora/0123456789ab/" + "0" * 64 + "/guessed.safetensors"):
        with pytest.raises(HTTPError) as caught:
            urlopen(hub.url + path)
        caught.value.close()
    assert [request.status for request in hub.log] == [206, 501, 403]


def test_a_failing_endpoint_fails_the_test(tmp_path: Path) -> None:
    server = HubServer()
    server.api.repos["me/broken"] = object()  # pyright: ignore[reportArgumentType]
    with pytest.raises(RuntimeError, match="the loopback Hub failed"), server:
        ask_client(server, "print(json.dumps(attempt(lambda: api.model_info('me/broken'))))", tmp_path)
