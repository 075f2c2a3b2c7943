"""What the loopback Hub answers: each endpoint a method that turns a call into a reply, no sockets here."""

from __future__ import annotations

import base64
import hashlib
import secrets
from collections.abc import Mapping
from urllib.parse import parse_qs, quote

from hub_protocol import Call, HubState, Reply, route
from hub_repos import (
    EPOCH,
    GITATTRIBUTES,
    REPO_NAME,
    Blob,
    Commit,
    HubError,
    Repo,
    apply_commit,
    as_list,
    describe,
    file_entry,
    folder_entry,
    front_matter,
    is_lfs,
    read_text,
    tree,
)


class HubApi(HubState):
    """The endpoints that the client uses for models."""

    def __init__(self) -> None:
        super().__init__()
        self._secret = secrets.token_hex(8)

    # -- accounts and repositories --------------------------------------------------------------------------------
    @route("GET", "/api/whoami-v2")
    def whoami(self, call: Call) -> Reply:
        if call.user is None:
            raise HubError(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": name} for name in sorted(self.members[call.user] - {call.user})]
        token = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": "write"}}
        return Reply.json({"type": "user", "id": call.user, "name": call.user, "orgs": orgs, "auth": token})

    @route("GET", "/api/agent-harnesses")
    def harnesses(self, call: Call) -> Reply:
        """Every client asks once per cache which programs could be driving it: none that this Hub knows."""
        return Reply.json({"standardEnvVars": [], "harnesses": {}})

    @route("POST", "/api/repos/create")
    def create(self, call: Call) -> Reply:
        asked = call.json
        if call.user is None:
            raise HubError(401, "Invalid username or password.")
        owner, name = asked.get("organization") or call.user, asked["name"]
        if not self._owns(call.user, owner):
            raise HubError(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        if not REPO_NAME.fullmatch(name):
            raise HubError(400, f"Invalid repo name: {name!r}")
        repo_id = f"{owner}/{name}"
        known = {"url": f"{self.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.repos:
            return Reply.json({"error": "You already created this model repo", **known}, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.add({".gitattributes": GITATTRIBUTES}, Repo(repo_id, private=private))
        return Reply.json(known)

    def add(self, files: Mapping[str, bytes], repo: Repo, revision: str = "main") -> Commit:
        """Plant a repository, or another revision of one, without going through the protocol."""
        with self.lock:
            repo = self.repos.setdefault(repo.id, repo)
            blobs = {path: Blob(data, is_lfs(path, data, len(data))) for path, data in files.items()}
            repo.store |= {blob.sha256: blob.data for blob in blobs.values() if blob.lfs}
            return repo.commit(blobs, "initial commit", revision, parent=repo.refs.get(revision))

    @route("DELETE", "/api/repos/delete")
    def delete(self, call: Call) -> Reply:
        owner = call.json.get("organization") or call.user
        del self.repos[self._writable(call, f"{owner}/{call.json['name']}").id]
        return Reply.json({})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, call: Call) -> Reply:
        try:
            card = front_matter(call.json["content"])
        except HubError as error:
            return Reply.json({"errors": [{"message": error.message}], "warnings": []}, 400)
        empty = [] if card else [{"message": "empty or missing yaml metadata in repo card"}]
        return Reply.json({"errors": [], "warnings": empty})

    @route("GET", "/api/models")
    def models(self, call: Call) -> Reply:
        asked = {name: call.query.get(name, []) for name in ("author", "filter", "search", "cursor", "limit")}
        start = int((asked["cursor"] or ["0"])[0])
        size = min(self.page_size, int((asked["limit"] or ["1000"])[0]))
        found = []
        for repo in self.repos.values():
            info = describe(repo, repo.at("main"), blobs=False)
            wanted = {word for text in asked["filter"] for word in text.split(",")}
            fits = info["author"] in (asked["author"] or [info["author"]]) and wanted <= set(info["tags"])
            fits = fits and all(word.lower() in repo.id.lower() for word in asked["search"])
            if fits and (not repo.private or self._owns(call.user, repo.namespace)):
                found.append(info)
        more = [(k, v) for k in ("author", "filter", "search", "limit") for v in asked[k]]
        rest = "&".join(f"{k}={quote(v, safe='')}" for k, v in [*more, ("cursor", str(start + size))])
        link = {"Link": f'<{self.url}/api/models?{rest}>; rel="next"'} if len(found) > start + size else {}
        return Reply.json(found[start : start + size], headers=link)

    @route("GET", "/api/(?:models|datasets)/REPO/revision/(?P<rev>[^/]+)")
    def revision_info(self, call: Call, repo: str, rev: str) -> Reply:
        found = self._readable(call, repo)
        return Reply.json(describe(found, found.at(rev), blobs=call.flag("blobs")))

    @route("GET", "/api/(?:models|datasets)/REPO/tree/(?P<rev>[^/]+)(?:/(?P<path>.+))?")
    def list_tree(self, call: Call, repo: str, rev: str, path: str) -> Reply:
        commit = self._readable(call, repo).at(rev)
        return Reply.json(tree(commit, path, recursive=call.flag("recursive")), headers={"X-Repo-Commit": commit.oid})

    @route("POST", "/api/(?:models|datasets)/REPO/paths-info/(?P<rev>[^/]+)")
    def paths_info(self, call: Call, repo: str, rev: str) -> Reply:
        commit = self._readable(call, repo).at(rev)
        is_json = call.body.startswith(b"{")
        asked = as_list(call.json["paths"]) if is_json else parse_qs(call.body.decode()).get("paths", [])
        folders = [path for path in asked if any(name.startswith(f"{path}/") for name in commit.files)]
        files = [file_entry(path, commit.files[path]) for path in asked if path in commit.files]
        return Reply.json([folder_entry(path) for path in folders] + files)

    # -- branches and history -------------------------------------------------------------------------------------
    @route("GET", "/api/(?:models|datasets)/REPO/refs")
    def list_refs(self, call: Call, repo: str) -> Reply:
        found = self._readable(call, repo)
        answer: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
        for name, oid in found.refs.items():
            kind, ref = ("tags", f"refs/tags/{name}") if name in found.tags else ("branches", f"refs/heads/{name}")
            kind, ref = ("pullRequests", name) if name.startswith("refs/pr/") else (kind, ref)
            answer[kind].append({"name": name, "ref": ref, "targetCommit": oid})
        return Reply.json(answer)

    @route("GET", "/api/(?:models|datasets)/REPO/commits/(?P<rev>[^/]+)")
    def list_commits(self, call: Call, repo: str, rev: str) -> Reply:
        entries = [{"id": c.oid, "title": c.title, "message": "", "date": EPOCH, "authors": []}
                   for c in self._readable(call, repo).history(rev)]  # fmt: skip
        return Reply.json(entries)

    @route("POST", "/api/models/REPO/(?P<kind>branch|tag)/(?P<name>[^/]+)")
    def create_ref(self, call: Call, repo: str, kind: str, name: str) -> Reply:
        found = self._writable(call, repo)
        new, start = (name, call.json.get("startingPoint", "main")) if kind == "branch" else (call.json["tag"], name)
        if new in found.refs:
            raise HubError(409, f"Reference already exists: {new}")
        found.refs[new] = found.at(start).oid
        found.tags |= {new} if kind == "tag" else set()
        return Reply.json({})

    @route("DELETE", "/api/models/REPO/(?P<kind>branch|tag)/(?P<name>[^/]+)")
    def delete_ref(self, call: Call, repo: str, kind: str, name: str) -> Reply:
        found = self._writable(call, repo)
        if name == "main" or name not in found.refs or (name in found.tags) != (kind == "tag"):
            raise HubError(404 if name != "main" else 403, f"Cannot delete {kind} {name}", "RevisionNotFound")
        del found.refs[name]
        found.tags.discard(name)
        return Reply.json({})

    # -- upload ---------------------------------------------------------------------------------------------------
    @route("POST", "/api/models/REPO/preupload/(?P<rev>[^/]+)")
    def preupload(self, call: Call, repo: str, rev: str) -> Reply:
        commit, files = self._writable(call, repo).at(rev), []
        for asked in call.json["files"]:
            path, sample = asked["path"], base64.b64decode(asked["sample"])
            mode = "lfs" if is_lfs(path, sample, asked["size"]) else "regular"
            entry = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            files.append(entry | ({"oid": commit.files[path].etag} if path in commit.files else {}))
        return Reply.json({"files": files, "commitOid": commit.oid})

    @route("POST", r"/REPO\.git/info/lfs/objects/batch")
    def lfs_batch(self, call: Call, repo: str) -> Reply:
        found, objects = self._readable(call, repo), []
        if call.user is None:
            raise HubError(401, "Invalid username or password.")
        for asked in call.json["objects"]:
            where = {
                "upload": {"href": f"{self.cdn}/cdn/upload/{repo}/{asked['oid']}", "header": {}},
                "verify": {"href": f"{self.url}/{repo}.git/info/lfs/verify"},
            }
            objects.append({**asked, **({} if asked["oid"] in found.store else {"actions": where})})
        return Reply.json({"transfer": "basic", "objects": objects})

    @route("PUT", "/cdn/upload/REPO/(?P<oid>[0-9a-f]{64})")
    def lfs_put(self, call: Call, repo: str, oid: str) -> Reply:
        if hashlib.sha256(call.body).hexdigest() != oid:
            raise HubError(400, "The content does not have the announced sha256")
        self.repos[repo].store[oid] = call.body
        return Reply(headers={"ETag": f'"{oid}"'})

    @route("POST", r"/REPO\.git/info/lfs/verify")
    def lfs_verify(self, call: Call, repo: str) -> Reply:
        if len(self._readable(call, repo).store.get(call.json["oid"], b"")) != call.json["size"]:
            raise HubError(404, "LFS object not found")
        return Reply.json({})

    @route("POST", "/api/models/REPO/commit/(?P<rev>[^/]+)")
    def commit(self, call: Call, repo: str, rev: str) -> Reply:
        found = self._writable(call, repo)
        if rev not in found.refs or rev in found.tags:
            raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        base = found.at(rev)
        files, title = apply_commit(base, call.body, found.store)
        front_matter(read_text(Commit("", files, title, None), "README.md"))
        number = 1 + sum(name.startswith("refs/pr/") for name in found.refs)
        ref = f"refs/pr/{number}" if call.flag("create_pr") else rev
        done = found.commit(files, title, ref, parent=base.oid)
        answer = {"success": True, "commitOid": done.oid, "commitUrl": f"{self.url}/{repo}/commit/{done.oid}"}
        pull = {"pullRequestUrl": f"{self.url}/{repo}/discussions/{number}"} if call.flag("create_pr") else {}
        return Reply.json(answer | pull)

    # -- download -------------------------------------------------------------------------------------------------
    @route("GET", "(?:/datasets)?/REPO/resolve/(?P<rev>[^/]+)/(?P<path>.+)")
    def resolve(self, call: Call, repo: str, rev: str, path: str) -> Reply:
        found = self._readable(call, repo)
        self._open_gate(call, found)
        commit = found.at(rev)
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", commit.oid)
        blob = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        if not blob.lfs:
            return Reply(200, blob.data, headers, file=True)
        linked = {"X-Linked-Size": str(len(blob.data)), "X-Linked-Etag": f'"{blob.sha256}"'}
        away = f"{self.cdn}/cdn/{found.id}/{self._sign(blob.sha256)}/{blob.sha256}/{quote(path)}"
        return Reply(302, b"Found", headers | linked | {"Location": away})

    def _sign(self, oid: str) -> str:
        """The part of a CDN address that only this Hub can make: the CDN asks for no token."""
        return hashlib.sha256(f"{self._secret}{oid}".encode()).hexdigest()[:12]

    @route("GET", "/cdn/REPO/(?P<signature>[0-9a-f]{12})/(?P<oid>[0-9a-f]{64})/.+")
    def download(self, call: Call, repo: str, signature: str, oid: str) -> Reply:
        if signature != self._sign(oid) or repo not in self.repos:
            raise HubError(403, "Access denied")
        return Reply(200, self.repos[repo].store[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}, file=True)

    @route("GET", "/api/(?:models|datasets)/REPO")
    def model_info(self, call: Call, repo: str) -> Reply:
        return self.revision_info(call, repo, "main")
