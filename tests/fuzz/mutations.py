"""Seeded mutations of JSON, safetensors and text files, and of names."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

RAW = "@raw:{}@"
"""Placeholder for text that ``json.dumps`` cannot write, such as a number of 5,000 digits."""
DEEP: Any = json.loads("[" * 200 + "]" * 200)
NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 2**31, 2**53 + 1, 2**63, 2**64, 10**400, 0.5, -0.0, 1e-300, 1e30, 1e308,
    float("nan"), float("inf"), float("-inf"), RAW.format("9" * 5000), RAW.format("1e999"), "", " ", "x", "1.0", "0",
    "true", "\0", "a\0b", "a\nb", "\x1b[2J\x1b[31mred", "\u202egnp.exe", "\ud800", "../../etc/passwd", "/etc/passwd",
    "~", "C:\\x", "(.*)*(.*)*x", "(", "[", "*", "^$", "a" * 10_000, "🦙", "%s%n", "{instruction}", "{{7*7}}",
    "<script>alert(1)</script>", "__import__('os')", [], {}, [[]], [None], [0, "0"], [1, 2, 3], {"": 0}, {"a": {}},
    {"(.*)*(.*)*x": 1}, DEEP, {"a": DEEP}, ["q_proj", 5], ["q_proj"], "q_proj", "all-linear", [2**63, 0], [[0, 2**63]],
]  # fmt: skip
"""Values that one field or another cannot have."""
NAMES = [
    "", ".", "..", "a\nb", "a\x1b[2J", "\u202eb", "a b", "-r", "--json", "%s", "a" * 300, "🦙", "a/../b", "con", "a.b",
    "$(id)", "a;b", "default", "\\", "'", '"', "{0}",
]  # fmt: skip
"""Names of folders and adapters."""


def mutate_json(text: bytes, rng: random.Random) -> bytes:
    """Change a JSON file: mostly one value, sometimes the structure or the bytes."""
    if rng.random() < 0.15:
        return mutate_bytes(text, rng)
    values = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _change(values, rng)
    mutated = json.dumps(values, ensure_ascii=rng.random() < 0.5 or _has_surrogate(values))
    before, found, rest = mutated.partition('"@raw:')
    while found:
        raw, _, rest = rest.partition('@"')
        before += raw
        raw, found, rest = rest.partition('"@raw:')
        before += raw
    if rng.random() < 0.05:
        key = rng.choice(list(values) or ["a"])
        before = (
            before[:-1] + f", {json.dumps(key)}: {json.dumps(rng.choice(NASTY[:8]))}}}"
        )  # a key that is there twice
    return before.encode("utf-8", "surrogatepass")


def mutate_lines(text: bytes, rng: random.Random) -> bytes:
    """Change one line of a JSON Lines file, as `mutate_json` does, or its bytes."""
    lines = text.splitlines()
    if rng.random() < 0.2:
        return mutate_bytes(text, rng)
    index = rng.randrange(len(lines))
    lines[index] = mutate_json(lines[index], rng)
    return b"\n".join(lines)


def _has_surrogate(values: Any) -> bool:
    return "\\ud800" in json.dumps(values)


def _change(values: Any, rng: random.Random) -> None:
    """Change one place of a JSON value, the nearer to the top the likelier."""
    holder, key = values, None
    while isinstance(holder, (dict, list)) and holder:
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        if not isinstance(holder[key], (dict, list)) or not holder[key] or rng.random() < 0.4:
            break
        holder = holder[key]
    if key is None:
        return
    action = rng.random()
    if action < 0.7:
        holder[key] = copy.deepcopy(rng.choice(NASTY))
    elif action < 0.8:
        del holder[key]
    elif isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(rng.choice([*NASTY, holder[key]])))
    elif action < 0.9:
        holder[rng.choice([one for one in NASTY if isinstance(one, str)])] = holder.pop(key)
    else:
        holder[rng.choice(["", "extra", "\x1b[2J", "a" * 500])] = copy.deepcopy(rng.choice(NASTY))


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Change the bytes of a file."""
    place = rng.randrange(len(data) + 1)
    changes: list[Callable[[], bytes]] = [
        lambda: b"", lambda: data[:place], lambda: data[:place] + b"\0" + data[place:], lambda: data + b"\n}",
        lambda: b"\xef\xbb\xbf" + data, lambda: data.decode("utf-8", "replace").encode("utf-16"),
        lambda: data[:place] + bytes([rng.randrange(128, 256)]) + data[place + 1 :], lambda: b"[" * 100_000,
        lambda: data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :], lambda: b" " * 1000,
        lambda: data.replace(b"\n", b"\r\n"), lambda: data + data, lambda: b"// comment\n" + data,
        lambda: data[:place] + b"a" * 200_000 + data[place:], lambda: rng.randbytes(rng.randrange(200)),
        lambda: b"[" + data + b"]", lambda: b"null", lambda: b'"text"', lambda: b"\x80\x04}q\x00.",
    ]  # fmt: skip
    return rng.choice(changes)()


DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8", "BOOL", "C64", "F4", "x"]


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Change a safetensors file: its header, its tensors or its bytes."""
    action = rng.random()
    if action < 0.15:
        return mutate_bytes(data, rng)
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    if action < 0.25:
        place = rng.randrange(len(body))
        body = body[:place] + bytes([body[place] ^ (1 << rng.randrange(8))]) + body[place + 1 :]
    elif action < 0.55:
        _change_entry(header, name, rng)
    elif action < 0.65:
        _change(header, rng)
    elif action < 0.75:
        header[rename(name, rng)] = header.pop(name)
    elif action < 0.8:
        size = rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63))
        return struct.pack("<Q", size) + data[8:]
    else:
        body = _change_values(header, body, name, rng)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def rename(name: str, rng: random.Random) -> str:
    """Return another name for a tensor: a spelling that tools use, or one that nobody does."""
    number = next((part for part in name.split(".") if part.isdigit()), "0")
    others = [
        name.replace("layers.", "layers._orig_mod."), f"_orig_mod.{name}", name.replace("base_model.model.", ""),
        name.replace(".weight", ".default.weight"), name.replace("lora_A", "lora_B"), "", "a" * 100_000, name.upper(),
        name.replace(".", "/"), name.replace("model.layers", "vision_tower.layers"), f"{name}\n",
        name.replace("layers", "x\x1b[2J"),
        *(name.replace(f".{number}.", f".{other}.") for other in ("1" * 5000, "99", "-1", "٣", "00")),
    ]  # fmt: skip
    return rng.choice(others)


def _change_entry(header: dict[str, Any], name: str, rng: random.Random) -> None:
    entry = header[name]
    start, end = entry["data_offsets"]
    shape = list(entry["shape"]) or [1]
    changes: list[Callable[[], Any]] = [
        lambda: entry.update(dtype=rng.choice(DTYPES)), lambda: entry.update(shape=shape[::-1]),
        lambda: entry.update(shape=[]), lambda: entry.update(shape=[0, *shape[1:]]),
        lambda: entry.update(shape=[2**63, 2]), lambda: entry.update(shape=[*shape, 1]),
        lambda: entry.update(shape=[shape[0] * shape[-1]]), lambda: entry.update(data_offsets=[end, start]),
        lambda: entry.update(data_offsets=[start, end + 4]), lambda: entry.update(data_offsets=[0, 2**62]),
        lambda: header.pop(name), lambda: header.update({f"{name}2": entry}),
        lambda: header.update(__metadata__={"a": rng.choice(["\0", "x" * 10_000, 5])}),
        lambda: entry.update(dtype="F16", shape=[*shape[:-1], shape[-1] * 2]),
        lambda: entry.update(dtype="I32"), lambda: entry.update(dtype=rng.choice(NASTY[:20])),
    ]  # fmt: skip
    rng.choice(changes)()


def _change_values(header: dict[str, Any], body: bytes, name: str, rng: random.Random) -> bytes:
    """Replace or scale the float32 values of one tensor or of all."""
    value = rng.choice([0.0, float("nan"), float("inf"), 3e38, 1e-45, 1.0, -1.0, "1e-25", "1e25", "1e4", "-1", "1e-10"])
    names = [name] if rng.random() < 0.5 else [one for one in header if one != "__metadata__"]
    data = bytearray(body)
    for one in names:
        start, end = header[one]["data_offsets"]
        if header[one]["dtype"] != "F32":
            continue
        values = struct.unpack(f"<{(end - start) // 4}f", data[start:end])
        scaled = [value if isinstance(value, float) else _float32(number * float(value)) for number in values]
        data[start:end] = struct.pack(f"<{len(scaled)}f", *scaled)
    return bytes(data)


def _float32(value: float) -> float:
    return max(min(value, 3.4e38), -3.4e38)


LINES = [
    b"", b"x" * 100_000, b"{", b"null", b'{"prompt": 5}', b'{"instruction": ["a"]}', b'{"prompt": ""}', b"\xff",
    b'{"prompt": "\\ud800"}', "\u2028".encode(), b"\x1b[2J", b'{"instruction": {}}',
    b'{"instruction": "a", "input": 5}',
]  # fmt: skip


def mutate_prompts(text: bytes, rng: random.Random) -> bytes:
    """Change a file of prompts: its encoding, its records or its lines."""
    if rng.random() < 0.5:
        return mutate_bytes(text, rng)
    lines = text.splitlines()
    line = rng.choice(LINES)
    lines.insert(rng.randrange(len(lines) + 1), line)
    return b"\n".join(lines)
