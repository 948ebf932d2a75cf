"""Tokenizers: a byte-level BPE trained on the data, or one that is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from conf.errors import Problem, RequestError
from conf.model_folder import check_whole
from recipes import hub
from recipes.data.network import offline_without_network
from recipes.durable import replace_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
BYTES = 256
DEFAULT_VOCABULARY = 8192
"""Entries of a tokenizer that is trained on the data, where neither data nor model say how many."""
LONG = 1024
"""Characters of a word, or of space, from which on one is cut where it is learned from. tokenizers 0.23 looks for the
pairs of a word anew after each merge: one of 3 million letters would take an hour."""
SPACE = "▁"
BYTE = re.compile("<0x[0-9A-F]{2}>")

# A forked process inherits the thread pool of `tokenizers` without its threads, and waits for them forever (0.23). Left
# to itself the library switches them off after a fork with a warning on stderr; here that happens without one.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE; `<|endoftext|>` (id 0) begins, ends and pads.

    Every string can be encoded and comes back unchanged from decoding. The same texts give the same tokenizer.
    The vocabulary is smaller than `vocab_size` when the texts have fewer pairs to merge.
    Raises RequestError when `vocab_size` does not even hold the 256 bytes and `<|endoftext|>`.
    """
    if vocab_size < BYTES + 1:
        rule = f"a byte-level vocabulary holds the {BYTES} bytes and {END_OF_TEXT}, at least {BYTES + 1} entries"
        raise RequestError(Problem("data.vocab_size", str(vocab_size), rule, f"data.vocab_size={BYTES + 1}"))
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in _without_long_words(text)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,  # cleaning would take spaces out of " ." and so not give the text back
    )


def _without_long_words(text: str) -> Iterator[str]:
    """A text in pieces, which has no word or space of 2 * LONG characters; in one where it has none of LONG."""
    start = 0
    for at in range(0, len(text) - LONG + 1, LONG):
        block = text[at : at + LONG]
        ends_in_space = block[0].isspace() or block[-1].isspace()
        if block.isspace() or not (ends_in_space or len(block.split(None, 1)) > 1):
            yield text[start : at + LONG]
            start = at + LONG
    yield text[start:]


def load_tokenizer(path: str, key: str = "model.tokenizer", revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub name or local folder; `key` names the setting in the RequestError when there is none."""
    if not Path(path).exists():
        offline_without_network()
    try:
        tokenizer: PreTrainedTokenizerBase = hub.tokenizer(path, revision=revision, key=key)
        if len(tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)) > 1:
            return tokenizer
        raise ValueError("its files are not there")  # transformers 5.23 makes one that knows no text
    except RequestError:
        raise
    except Exception as error:  # it raises anything, by what the files lack and the kind of tokenizer
        if Path(path).is_dir():
            check_whole(Path(path))
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if Path(path).is_dir():
            files = ", ".join(sorted(entry.name for entry in Path(path).iterdir())[:8]) or "nothing"
            nearest = f"a folder with tokenizer.json; this one has: {files}"
        else:
            nearest = f"{key}=FOLDER, or a name already in the cache of HF_HOME when there is no network"
        raise RequestError(Problem(key, path, f"no tokenizer could be loaded from it ({reason})", nearest)) from error


def without_begin(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[str]:
    """Texts without the special tokens, written out at their beginning, that the tokenizer puts there itself."""
    whole, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    before = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
    begin = "".join(tokenizer.convert_ids_to_tokens(whole[:before]))
    found = list(texts)
    for number, text in enumerate(found):
        while begin and text.startswith(begin):
            text = found[number] = text.removeprefix(begin)
    return found


def add_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a tokenizer that adds no special tokens (one trained here, GPT-2's) put its end of text around each text.

    A decoder's answer is read from the last token, an encoder's from the first, and both want one that sums up. It is
    a part of the tokenizer, so that it is saved with the model, and that what is cut is never an end.
    """
    if not tokenizer.num_special_tokens_to_add():
        _put(tokenizer, "| A |", "| A | B |")


def end_texts(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a tokenizer end each text with its end of text, where it does not: the sign to begin with a translation.

    A part of the tokenizer, as the ends of `add_ends`: whoever uses the saved model gives it what it was trained on.
    """
    if tokenizer("a")["input_ids"][-1:] != [tokenizer.eos_token_id]:
        _put(tokenizer, "A |", "A B |")


def _put(tokenizer: PreTrainedTokenizerBase, single: str, pair: str) -> None:
    """Let a tokenizer put its end of text (`|`) around a text (`A`), or two (`B`), behind what it does already.

    One in Python, or without an end of text, stays as it is.
    """
    backend, end = getattr(tokenizer, "backend_tokenizer", None), tokenizer.eos_token
    if backend is None or end is None:
        return
    from tokenizers import processors

    # One segment, also of two texts: a model that was not made for pairs may have no other.
    parts = {"|": f"{end}:0", "A": "$A:0", "B": "$B:0"}
    ends = processors.TemplateProcessing(
        single=[parts[part] for part in single.split()], pair=[parts[part] for part in pair.split()],
        special_tokens=[(end, tokenizer.eos_token_id)],
    )  # fmt: skip
    backend.post_processor = processors.Sequence([backend.post_processor, ends]) if backend.post_processor else ends


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save it so that `AutoTokenizer` reads texts, and pairs of them, as it does here.

    transformers 5.23: GPTNeoXTokenizer makes its post-processor anew when it is loaded, without the ends that were
    added; the general class takes the one that was saved. Raises RuntimeError where that does not help.
    """

    def reads() -> bool:
        again = hub.tokenizer(folder)
        probes = (("A small probe.",), ("A small probe.", "And a second one."))
        return all(tokenizer(*probe)["input_ids"] == again(*probe)["input_ids"] for probe in probes)

    tokenizer.save_pretrained(folder)
    if getattr(tokenizer, "backend_tokenizer", None) is None or reads():  # one in Python has no ends of ours
        return
    file = Path(folder) / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    replace_text(file, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    if not reads():
        raise RuntimeError(f"{type(tokenizer).__name__}: what was saved in {folder} reads texts otherwise")


def spaces_are_of_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether words given one by one lack the space that they have in a text (GPT-2, Gemma); measured."""

    def ids(text: str | list[str]) -> list[int]:
        return tokenizer(text, is_split_into_words=isinstance(text, list), add_special_tokens=False)["input_ids"]

    text = ids("we saw")
    return ids(["we", "saw"]) != text and ids(["we", " saw"]) == text


def is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it works on bytes, as GPT-2's does: a word in a text begins with the space before it.

    Reads all of the tokenizer (10 ms or more): not to be asked row by row.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    steps = json.loads(backend.to_str())["pre_tokenizer"] if backend is not None else None
    return steps is not None and any(step["type"] == "ByteLevel" for step in (steps, *steps.get("pretokenizers", ())))


def id_count(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than its largest id: ids may have gaps, so there can be fewer tokens than that."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> np.ndarray | None:
    """(V,) bytes of text that each token stands for, 0 for special ones; None where tokens do not tell (WordPiece).

    Byte-level tokens have a character for each byte; SentencePiece writes a space as `▁`, and a byte that is no
    character of its own as `<0xE2>`.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return None
    names = tokenizer.convert_ids_to_tokens(list(range(id_count(tokenizer))))
    byte_level = is_byte_level(tokenizer)
    if not byte_level and not any(name and name.startswith(SPACE) for name in names):
        return None
    counts = [len(name) if byte_level else 1 if BYTE.fullmatch(name) else len(name.replace(SPACE, " ").encode())
              for name in (name or "" for name in names)]  # fmt: skip
    sizes = np.array(counts, np.int64)
    sizes[[number for number in tokenizer.all_special_ids if number < len(sizes)]] = 0
    return sizes


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes whenever the tokenizer would give other tokens for some row."""
    template = tokenizer.chat_template
    settings = {"specials": tokenizer.special_tokens_map, "template": template, "class": type(tokenizer).__name__}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        model = json.loads(backend.to_str())
        del model["truncation"], model["padding"]  # left behind by the latest call, not part of the tokenizer
        digest.update(json.dumps(model, sort_keys=True).encode())
        return digest.hexdigest()
    with tempfile.TemporaryDirectory() as folder:
        for name in sorted(tokenizer.save_pretrained(folder)):
            if Path(name).is_file():
                digest.update(Path(name).read_bytes())
    return digest.hexdigest()
