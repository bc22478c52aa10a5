"""Text out of Debian and PyPI packages: what the demo is distilled, calibrated and evaluated on.

In: one folder with unpacked packages (`SOURCES` names them and the commands). Out: plain text by
document. Every document belongs to exactly one of distillation, calibration and evaluation.
"""

import gzip
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

SOURCES = """
apt-get download r-cran-janeaustenr dict-devil dict-jargon dict-foldoc python3.11-doc \\
    golang-1.19-src anarchism debian-policy developers-reference
for deb in *.deb; do dpkg-deb -x "$deb" "packages/${deb%%_*}"; done
pip download --no-deps --no-binary :all: brotli==1.2.1 && tar -C packages -xzf brotli-1.2.1.tar.gz
"""

CHAT_OPENING = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\n"
)

AUSTEN = "r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
BROTLI = "brotli-1.2.1/tests/testdata"
PYTHON = "python3.11-doc/usr/share/doc/python3.11/html/_sources"
OPTICKS = "golang-1.19-src/usr/share/go-1.19/src/testdata/Isaac.Newton-Opticks.txt"

CALIBRATION_NOVEL = "Persuasion"
EVALUATION_NOVEL = "NORTHANGER ABBEY"
CALIBRATION_PYTHON = ("tutorial/*.txt",)
EVALUATION_PYTHON = (
    "howto/regex.*",
    "howto/sorting.*",
    "howto/sockets.*",
    "howto/unicode.*",
    "howto/urllib2.*",
)
DISTILLATION_PYTHON = ("library/*.txt", "reference/*.txt", "extending/*.txt")


@dataclass(frozen=True)
class Document:
    """One text; `name` says where it comes from, `weight` how often distillation draws from it."""

    name: str
    text: str
    weight: float = 1.0


def austen(packages: Path) -> dict[str, str]:
    """Jane Austen's novels by title, out of R's lazy-load database (zlib blocks of XDR strings)."""
    data = (packages / AUSTEN).read_bytes()
    novels = {}
    start = 0
    while start < len(data):
        block = zlib.decompressobj()
        strings = _xdr_strings(block.decompress(data[start + 4 :]))
        title = next(line for line in strings if line.strip())
        novels[title] = "\n".join(strings)
        start = len(data) - len(block.unused_data)
    return novels


def _xdr_strings(data: bytes) -> list[str]:
    """The elements of the one character vector in an R serialisation (flag word, length, bytes)."""
    header = data.index(b"\x00\x00\x00\x10", 14)
    count = int.from_bytes(data[header + 4 : header + 8], "big")
    position = header + 8
    strings = []
    for _ in range(count):
        length = int.from_bytes(data[position + 4 : position + 8], "big")
        strings.append(data[position + 8 : position + 8 + length].decode("utf-8", "replace"))
        position += 8 + length
    return strings


def rst_text(source: str) -> str:
    """reStructuredText with directives, targets and roles taken off; prose and examples stay."""
    source = re.sub(r"^\.\. .*$(\n[ \t]+:.*$)*", "", source, flags=re.MULTILINE)
    source = re.sub(r":[a-z:+-]+:`~?!?([^`<]+?)(?:\s+<[^>`]*>)?`", r"\1", source)
    return re.sub(r"\n{3,}", "\n\n", source)


def python_docs(packages: Path, patterns: Iterable[str]) -> str:
    files = sorted({path for pattern in patterns for path in (packages / PYTHON).glob(pattern)})
    return "\n\n".join(rst_text(path.read_text(encoding="utf-8")) for path in files)


def dictionary(packages: Path, name: str) -> str:
    """A dictd dictionary without its links and its front matter."""
    raw = gzip.decompress((packages / f"dict-{name}/usr/share/dictd/{name}.dict.dz").read_bytes())
    return re.sub(r"[{}\u00ad]", "", raw.decode("utf-8", "replace"))


class _Text(HTMLParser):
    """Visible text of a page, a blank line between paragraphs."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("p", "h1", "h2", "h3", "li", "br", "div", "blockquote", "dd", "dt"):
            self.parts.append("\n\n" if tag != "br" else "\n")

    def handle_data(self, data: str) -> None:
        self.parts.append(re.sub(r"\s+", " ", data))


def html_text(pages: Iterable[Path]) -> str:
    parser = _Text()
    for page in pages:
        parser.feed(page.read_text(encoding="utf-8", errors="replace"))
    lines = "".join(parser.parts)
    return re.sub(r"\n\s*\n+", "\n\n", lines)


def unwrap(text: str) -> str:
    """Join the lines of a paragraph, as text on the web is laid out."""
    paragraphs = re.split(r"\n\s*\n", text.replace("\r", ""))
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())


def excerpt(text: str, size: int, start: int = 0) -> str:
    """About `size` characters from `start`, cut at blank lines."""
    begin = text.find("\n\n", start) + 2 if start else 0
    end = text.rfind("\n\n", begin, begin + size)
    return text[begin : end if end > begin else begin + size].strip() + "\n"


def as_chats(packages: Path) -> str:
    """Definitions of the FOLDOC as answers in the base model's chat form, the term asked for."""
    entry = re.compile(r"^(\S[^\n]{2,40})\n\n((?:   [^\n]+\n|\n)+)", re.MULTILINE)
    chats = []
    for term, answer in entry.findall(dictionary(packages, "foldoc")):
        body = unwrap(re.sub(r"<[^>]*>|\(\d{4}-\d\d-\d\d\)", "", answer))
        if len(body) > 300:
            question = f"{CHAT_OPENING}What is {term}?<|im_end|>\n"
            chats.append(f"{question}<|im_start|>assistant\n{body}<|im_end|>\n")
    return "\n\n".join(chats)


def evaluation_documents(packages: Path) -> list[Document]:
    alice = (packages / BROTLI / "alice29.txt").read_text(encoding="latin-1")
    workshop = (packages / BROTLI / "lcet10.txt").read_text(encoding="latin-1")
    devil = dictionary(packages, "devil")
    return [
        Document("alice", excerpt(unwrap(alice), 90_000, alice.index("CHAPTER I"))),
        Document(
            "northanger-abbey", excerpt(unwrap(austen(packages)[EVALUATION_NOVEL]), 60_000, 2_000)
        ),
        Document("electronic-texts", excerpt(unwrap(workshop), 80_000, 20_000)),
        Document("devils-dictionary", excerpt(devil, 60_000, devil.index("ABSOLUTE, adj."))),
        Document("python-howto", excerpt(python_docs(packages, EVALUATION_PYTHON), 80_000)),
    ]


def calibration_documents(packages: Path) -> list[Document]:
    opticks = (packages / OPTICKS).read_text(encoding="utf-8")
    shakespeare = (packages / BROTLI / "asyoulik.txt").read_text(encoding="latin-1")
    jargon = dictionary(packages, "jargon")
    return [
        Document("persuasion", excerpt(unwrap(austen(packages)[CALIBRATION_NOVEL]), 90_000, 2_000)),
        Document("as-you-like-it", excerpt(shakespeare, 40_000, 3_000)),
        Document("opticks", excerpt(unwrap(opticks), 80_000, 8_000)),
        Document("jargon-file", excerpt(jargon, 80_000, 200_000)),
        Document("python-tutorial", excerpt(python_docs(packages, CALIBRATION_PYTHON), 90_000)),
    ]


def distillation_documents(packages: Path) -> list[Document]:
    """Whole works that neither the calibration nor the evaluation text is cut from."""
    held_out = (CALIBRATION_NOVEL, EVALUATION_NOVEL)
    novels = [text for title, text in austen(packages).items() if title not in held_out]
    milton = (packages / BROTLI / "plrabn12.txt").read_text(encoding="latin-1")
    essays = sorted((packages / "anarchism/usr/share/doc/anarchism/html").glob("sec*.html"))
    manuals = sorted((packages / "debian-policy/usr/share/doc/debian-policy").rglob("*.html"))
    manuals += sorted((packages / "developers-reference/usr/share").rglob("*.en.html"))
    return [
        Document("novels", unwrap("\n\n".join(novels)), 2.5),
        Document("paradise-lost", milton, 0.2),
        Document("essays", html_text(essays), 2.0),
        Document("foldoc", dictionary(packages, "foldoc"), 1.0),
        Document("python-library", python_docs(packages, DISTILLATION_PYTHON), 1.5),
        Document("manuals", html_text(page for page in manuals if page.is_file()), 0.5),
    ]


def ngrams(text: str, words: int = 12) -> set[tuple[str, ...]]:
    """Every run of `words` words, letters and digits only, in lower case."""
    tokens = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(tokens[i : i + words]) for i in range(len(tokens) - words + 1)}


def without_overlap(text: str, held_out: set[tuple[str, ...]]) -> str:
    """`text` without the paragraphs that share a run of words with `held_out`."""
    words = len(next(iter(held_out)))
    paragraphs = text.split("\n\n")
    return "\n\n".join(p for p in paragraphs if held_out.isdisjoint(ngrams(p, words)))
