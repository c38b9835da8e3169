"""Damage to the files of a checkpoint or of a saved state: what is done follows from a seed alone.

`IN_FOLDERS` has the kinds of damage that change the folder, beside those of `mutations_of_bytes`, which change one file
in it; beside the folder, in `outside`, is a copy of all of it.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from mutations_of_bytes import IN_BYTES, IN_HEADERS, IN_JSON, KEYS, names_in, packed, parsed, text_of, unpacked


CANARY = "executed"  # a file that there is, in the working directory, if code of a checkpoint ran
CODE = f"open({CANARY!r}, 'w').close()\n"


class Hostile:
    """Makes the canary when it is unpickled."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path(CANARY),))


def _file(random: Random, folder: Path) -> Path:
    return random.choice(sorted(path for path in folder.iterdir() if path.is_file()))


def remove_file(random: Random, folder: Path) -> str:
    path = _file(random, folder)
    path.unlink()
    return f"no {path.name}"


def double_file(random: Random, folder: Path) -> str:
    """Under a name by which it may be found too, or be taken for another."""
    path = _file(random, folder)
    names = {
        ".safetensors": ("model.safetensors", "a.safetensors", "model-00001-of-00002.safetensors", "consolidated.pt"),
        ".json": ("config.json", "generation_config.json", "model.safetensors.index.json", "other.index.json"),
        ".bin": ("pytorch_model.bin", "model.pt", "model.safetensors"),
    }
    name = random.choice(names.get(path.suffix, ("config.yml", "tokenizer.model", "NOTICE", "vocab.txt")))
    if path.name != name:
        shutil.copyfile(path, folder / name)
    return f"{path.name} as {name}"


def double_weight(random: Random, folder: Path) -> str:
    """Another tensor under the name of one that is in another file."""
    files = sorted(folder.glob("*.safetensors"))
    a, b = random.sample(files, 2) if len(files) > 1 else (files[0], folder / "other.safetensors")
    header, body = unpacked(a.read_bytes())
    name = random.choice(names_in(header))
    start, end = header[name]["data_offsets"]
    theirs, rest = unpacked(b.read_bytes()) if b.exists() else ({}, b"")
    theirs[name] = {**header[name], "data_offsets": [len(rest), len(rest) + end - start]}
    value = body[start:end] if random.random() < 0.5 else bytes(end - start)
    b.write_bytes(packed(theirs, rest + value))
    return f"{name} of {a.name} in {b.name} too"


def swap_files(random: Random, folder: Path) -> str:
    a, b = _file(random, folder), _file(random, folder)
    x, y = a.read_bytes(), b.read_bytes()
    a.write_bytes(y)
    b.write_bytes(x)
    return f"{a.name} and {b.name} swapped"


def link(random: Random, folder: Path) -> str:
    """Within the folder, out of it, to itself, to nothing, to a device."""
    path = _file(random, folder)
    other = f"moved-{path.name}"
    path.rename(folder / other)
    targets = (other, f"../outside/{path.name}", str(folder.parent / "outside" / path.name), path.name, "nothing", ".")
    target = random.choice((*targets, "/dev/null", "/dev/zero", "/proc/self/mem", "/proc/self/environ"))
    path.symlink_to(target)
    return f"{path.name} -> {target}"


def no_file(random: Random, folder: Path) -> str:
    path = _file(random, folder)
    path.unlink()
    how = random.choice(("folder", "full folder", "pipe", "empty"))
    if how == "pipe":
        os.mkfifo(path)
    elif how == "empty":
        path.touch()
    else:
        path.mkdir()
    if how == "full folder":
        shutil.copytree(folder.parent / "outside", path, dirs_exist_ok=True)
    return f"{path.name} as {how}"


def add_file(random: Random, folder: Path) -> str:
    """What there is not in a checkpoint, or of a name that asks for trouble."""
    names = (
        "LICENSE-\x1b[31m\nerror: x", "NOTICE" + "x" * 200, "licence\\..\\x", "tokenizer.model", "vocab.txt",
        "added_tokens.json", "special_tokens_map.json", "merges.txt", "chat_template.jinja", "adapter_config.json",
        "\udcff.safetensors", "é.json", ".safetensors", "-rf", "config.yml", "preprocessor_config.json", ".lock",
        "additional_chat_templates/a.jinja", "additional_chat_templates/x\n.jinja",
    )  # fmt: skip
    path = folder / random.choice(names)
    path.parent.mkdir(exist_ok=True)
    contents = (b"", b"{}", b"[]", b"\xff\xfe", b"x" * 100, b"{{ ''.__class__.__mro__ }}", text_of("raw nesting"))
    path.write_bytes(random.choice(contents))
    return f"{path.name!r} added"


def add_links_out(random: Random, folder: Path) -> str:
    name = random.choice(("LICENSE", "NOTICE.txt", "tokenizer_config.json", "tokenizer.json", "vocab.txt", "chats"))
    path, target = folder / name, folder.parent / "outside"
    if name == "chats":
        path, target = folder / "additional_chat_templates", folder.parent / "outside"
        (target / "a.jinja").write_text("x", encoding="utf-8")
    else:
        target = target / "secret"
        target.write_text("{}", encoding="utf-8")
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    return f"{path.name} leads out"


def change_index(random: Random, folder: Path) -> str:
    """Names of files in an index that are none of files beside it."""
    path = next(iter(folder.glob("*.index.json")))
    index = json.loads(path.read_bytes())
    where = index["weight_map"]
    name, file = random.choice(sorted(where)), random.choice(sorted(set(where.values())))
    outside = folder.parent / "outside" / file
    new = random.choice((
        f"../outside/{file}", str(outside), f"./{file}", f"../{folder.name}/{file}", "config.json", ".", "..", "", None,
        5, [file], {"a": file}, "x" * 5000, "\0", f"{file}\0", "pipe.safetensors", f"..\\outside\\{file}", "none.bin",
        "raw surrogate", "nothing.safetensors", file.upper(), f"{file}/",
    ))  # fmt: skip
    if new == "pipe.safetensors":
        os.mkfifo(folder / new)
    if random.random() < 0.5:
        where[name] = new
    else:  # all that are in this file
        where.update({x: new for x in where if where[x] == file})
    path.write_bytes(text_of(index))
    return f"the index says {new!r:.80}"


def add_code(random: Random, folder: Path) -> str:
    """Python beside the weights, which the configuration points to; of a known model or of another."""
    path = folder / random.choice(["config.json", "config.json", "tokenizer_config.json"])
    fields = json.loads(path.read_bytes()) if path.is_file() else {}
    fields["auto_map"] = KEYS["auto_map"]
    if random.random() < 0.7:
        fields["model_type"] = random.choice(("hostile", "", None, 5, "xlstm_lm", "xlstm"))
    if random.random() < 0.3:
        fields["tokenizer_class"] = random.choice(("Code", "hostile.Code"))
    path.write_bytes(text_of(fields))
    files = "hostile modeling_xlstm configuration_xlstm __init__ setup torch json tokenization_hostile"
    for name in files.split():
        (folder / f"{name}.py").write_text(f"{CODE}class Code:\n    pass\n", encoding="utf-8")
    return f"code, by {path.name}"


def add_pickle(random: Random, folder: Path) -> str:
    """In place of the weights, beside them, or by their name; of each kind that PyTorch has."""
    names = ("pytorch_model.bin", "weights.pt", "model.pth", "x.ckpt", "model.safetensors", "training_args.bin")
    name, how = random.choice(names), random.choice(("zip", "legacy", "pickle", "object"))
    if random.random() < 0.7:
        for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json"), *folder.glob("*.bin")]:
            path.unlink()
    value = Hostile() if how == "object" else {"model.embed_tokens.weight": torch.zeros(99, 32), "x": Hostile()}
    if how in ("zip", "legacy"):
        torch.save(value, folder / name, _use_new_zipfile_serialization=how == "zip")
    else:
        (folder / name).write_bytes(pickle.dumps(value))
    return f"a {how} that runs code, {name}"


def add_huge_pickle(random: Random, folder: Path) -> str:
    """Of a tensor whose every row is the same few bytes."""
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json"), *folder.glob("*.bin")]:
        path.unlink()
    name = random.choice(("model.embed_tokens.weight", "backbone.embeddings.weight", "token_embedding.weight"))
    value = torch.zeros(1, dtype=random.choice((torch.float32, torch.float64, torch.int8)))
    torch.save({name: value.expand(random.choice((99, 10**10)), 10**3)}, folder / "pytorch_model.bin")
    return f"a huge {name} of {value.dtype}"


IN_FOLDERS: dict[str, Callable[[Random, Path], str]] = {
    "files missing": remove_file,
    "files doubled": double_file,
    "weights doubled": double_weight,
    "files swapped": swap_files,
    "links": link,
    "folders and pipes in place of files": no_file,
    "files added": add_file,
    "links that lead out": add_links_out,
    "indexes that lead elsewhere": change_index,
    "code beside weights": add_code,
    "pickles that run code": add_pickle,
    "pickles of huge declared sizes": add_huge_pickle,
}
NEEDS = {"weights doubled": "*.safetensors", "indexes that lead elsewhere": "*.index.json"}


def applies(kind: str, folder: Path) -> bool:
    """Whether there is in `folder` what damage of this kind is done to."""
    return bool(_candidates(kind, folder)) if kind not in IN_FOLDERS else any(folder.glob(NEEDS.get(kind, "*")))


def _candidates(kind: str, folder: Path) -> list[Path]:
    suffixes: tuple[str, ...] = ("",)
    if kind in IN_JSON:
        suffixes = (".yaml",) if kind == "values repeated by aliases" else (".json", ".yaml")
    elif kind in IN_HEADERS:
        suffixes = (".safetensors",)
    return sorted(path for path in folder.iterdir() if path.name.endswith(suffixes))


def damage(random: Random, kind: str, folder: Path) -> str:
    """Does it, and says to what."""
    if kind in IN_FOLDERS:
        return IN_FOLDERS[kind](random, folder)
    path = random.choice(_candidates(kind, folder))
    data = path.read_bytes()
    if kind in IN_BYTES:
        data = IN_BYTES[kind](random, data)
    elif kind in IN_JSON:
        data = IN_JSON[kind](random, parsed(data))
    else:
        data = IN_HEADERS[kind](random, *unpacked(data))
    path.write_bytes(data)
    return path.name
