"""Wrong uses of the commands, drawn at random, and what must come of each: one line, status 2, nothing written.

wrong_yaml, wrong_flags, unlikely_flags   ways to spoil a working configuration
wrong_command   any other command, spoilt
strange_file    a right use of a command, one of whose files is something else
Shop         a tiny run's files, a finished run and its export, which the words name
call, forked  run a command in this process, in a process of its own -> Outcome
at_most      while entered, a limit of time
"""

import contextlib
import copy
import functools
import importlib
import os
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_prune.commands import COMMANDS
from megatron_prune.commands import main as commands
from megatron_prune.config import Config, load_config
from megatron_prune.config.options import all_options, options_of, sections_of
from megatron_prune.errors import UserError
from megatron_prune.testing.helpers.tiny_runs import TinyRun

OPTIONS = all_options(Config)
VALUES = [
    *("-1", "0", "1", "2", "3", "7", "16", "64", "0.5", "nan", "inf", "-inf", "1e23", "1e-300", "1e308", "1e999"),
    *("4294967296", "2147483648", "2147483647", "-9e18", "9" * 400, "0x10", "1_", "1:0", "1:9", "5,,", "100,0,0"),
    *("", " ", "null", "~", "true", "yes", "\x1b[31m", "a\nb", "a b", "１２", "∞", "x" * 300, "x/" * 3000, "'", '"'),
    *("/dev/null", "/nonexistent/x", "../..", ".", "1 2", "1 a 2 b"),
]
SMALL = ["0", "1", "2", "3", "4", "5", "8", "16", "31", "32", "33", "48", "64", "100", "1000"]
_LETTERS = [*"\t\0{}[:'\"%|>é\n ", "- ", "&a", "*a", "!!python/object:os.system", "\ufeff", "\x07"]


@dataclass(frozen=True)
class Outcome:
    """Exit status, and all that was printed."""

    status: int
    output: str

    @property
    def errors(self):
        return [line for line in self.output.splitlines() if line.startswith("error: ")]

    def problems(self, may_be=(0, 2)):
        """What no use may come to."""
        if self.status not in may_be:
            yield f"status {self.status}"
        if not self.output.translate({ord(mark): None for mark in "\n\t\r"}).isprintable():
            yield "a terminal would obey this: " + repr(self.output[-1500:])
        if "Traceback" in self.output:
            yield "a traceback: ..." + self.output[-1500:]
        if self.status == 2 and (len(self.errors) != 1 or not self.errors[0].isprintable()):
            yield f"{len(self.errors)} error lines"


def call(main, words, capfd):
    """Run `main(words)`, of which pytest's `capfd` keeps the output."""
    capfd.readouterr()
    status = main([str(word) for word in words])
    return Outcome(status, "".join(capfd.readouterr()))


def forked(main, words, output, limit=120.0):
    """Run `main(words)` in a child of this process, which need not import anything again; its output goes to a file.

    Status 124: it was ended after `limit` seconds.
    """
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setsid()
            file = os.open(output, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            for number, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), file, file)):
                os.dup2(descriptor, number)
            status = main([str(word) for word in words])
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(status)
    end = time.monotonic() + limit
    while not (waited := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return Outcome(124, output.read_text(errors="replace"))
        time.sleep(0.01)
    return Outcome(os.waitstatus_to_exitcode(waited[1]), output.read_text(errors="replace"))


def files(folder):
    """All files in `folder` with size and time; caches of indices may come and go."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in found if "GPTDataset" not in p.name}


class Shop:
    """`folder` with inputs, a finished run in `run`, its export in `hf`, and the source as a GGUF file."""

    def __init__(self, folder):
        self.folder, self.tiny = folder, TinyRun(folder / "inputs")
        self.run, self.hf, self.text = folder / "run", folder / "hf", self.tiny.folder / "text_0.txt"
        self.gguf = folder / "source.gguf"

    def write_gguf(self):
        """The source's model with a BPE tokenizer, which can be read again."""
        import sentencepiece

        place = shutil.copytree(self.tiny.source, self.folder / "bpe")
        sentencepiece.SentencePieceTrainer.train(
            input=str(self.text), model_prefix=f"{place}/tokenizer", vocab_size=64, model_type="bpe", minloglevel=2
        )
        assert commands(["convert-to-gguf", "--hf-model", str(place), "--save", str(self.gguf)]) == 0

    @functools.cached_property
    def megatron(self):
        """The export as Megatron-LM's checkpoint."""
        place = self.folder / "megatron"
        assert commands(["convert-to-megatron", "--load", str(self.run), "--save", str(place)]) == 0
        return place

    def configuration(self, save):
        """A working one, as YAML's values."""
        tiny, data = self.tiny, f"3 {self.tiny.data(0)} 1 {self.tiny.data(1)}"
        tokenizer = str(tiny.folder / "tokenizer.model")
        groups = {"head": {"cost": "2", "floor": "2"}, "ffn": {"floor": "38"}}
        return {
            "model": {"hf_model": str(tiny.source), "make_vocab_size_divisible_by": "8"},
            "parallel": {"device": "cpu"},
            "data": {"tokenizer_model": tokenizer, "data_path": data, "split": "80,20,0", "seq_length": "32"},
            "training": {"global_batch_size": "2", "train_iters": "40", "eval_interval": "1000", "eval_iters": "1"},
            "optimizer": {"lr": "2e-3", "lr_warmup_iters": "3"},
            "pruning": {"target_params": "11400", "ratio": "2:1", "gqa": "cluster", "groups": groups},
            "continued": {"continue_tokens": "256", "continue_lr_warmup_iters": "2"},
            "checkpoint": {"save": str(save)},
            "logging": {"log_interval": "1", "progress": "lines"},
        }

    def places(self):
        """Paths of all sorts."""
        tiny, run = self.tiny, self.run
        own = [tiny.source, tiny.source / "config.json", tiny.data(0), tiny.folder / "tokenizer.model", self.hf, run]
        own += [run / "iter_0000014", run / "summary.json", self.folder / "nowhere", "gpt2", "meta-llama/Llama-2-7b"]
        return [*own, "/dev/null", "/dev/full", "/proc/self", "/proc/nowhere/x", "/", ".", "", "~", "a\nb", "x" * 300]

    def blends(self):
        """Data sets as they should not be named."""
        p, q = self.tiny.data(0), self.tiny.data(1)
        alone = [f"nan {p}", f"-1 {p}", f"1e400 {p}", '"', f"{p}.bin", f"{p}.idx", self.tiny.source, p]
        several = [("1", p, "1"), (p, p), ("1", p, "1", self.folder / "nowhere"), ("1", f"'{p}'"), ("", p)]
        return [*((one,) for one in alone), *several, ("1e-300", p, "1e300", q), ("1e308", p, "1e308", q)]


def wrong_yaml(random, configuration):
    """A configuration file with something wrong in it, maybe."""
    wrong = copy.deepcopy(configuration)
    how, section, known = random.randrange(8), random.choice(list(wrong)), random.choice(list(sections_of(Config)))
    name = random.choice(options_of(sections_of(Config)[known], known)).name
    text = yaml.safe_dump(wrong)
    start, end = sorted(random.randrange(len(text)) for _ in range(2))
    if how == 0:
        wrong[random.choice([section, "modle", "nonsense"])] = _anything(random)
    elif how == 1:
        wrong.setdefault(known, {})[name] = _anything(random)
    elif how == 2:
        wrong[section][random.choice(["lrr", "floor", "target_param", "a b", "\x1b", "1"])] = _anything(random)
    elif how == 3:
        return text[:start] + random.choice(_LETTERS) + text[start + random.randrange(3) :]
    elif how == 4:
        return text[:start] + text[end:]
    elif how == 5:
        wrong[section].pop(random.choice(list(wrong[section])))
    elif how == 6:
        wrong.setdefault(known, {})[name] = random.choice(VALUES)
    else:
        wrong[section], wrong[known] = wrong.get(known), wrong[section]
    return yaml.safe_dump(wrong, allow_unicode=True)


def _anything(random, depth=0):
    kind = random.randrange(10)
    if kind < 6 or depth > 3:
        return random.choice([*VALUES, None, True, 1, -1, 0.5, 2**31])
    if kind < 8:
        return [_anything(random, depth + 1) for _ in range(random.randrange(3))]
    return {
        random.choice(["a", "head", "ffn", "stem"]): _anything(random, depth + 1) for _ in range(random.randrange(3))
    }


def wrong_flags(random):
    """Up to three fields with values of no sense."""
    words = []
    for found in random.choices(OPTIONS, k=random.randint(1, 3)):
        value = random.choice(found.choices) if found.choices and random.random() < 0.4 else random.choice(VALUES)
        if found.kind is bool:
            words.append(random.choice([found.flag, found.off_flag]))
        elif found.parts:
            name = random.choice(["head.", "ffn.", "stem.", "nohead.", "."]) if found.is_named else ""
            words += [found.flag, f"{name}{random.choice(found.parts).name}={value}"]
        else:
            words.append(f"{found.flag}={value}")
    return words


def unlikely_flags(random, shop):
    """Small numbers that may not go together, other folders, other data, a checkpoint to resume."""
    numbers = [found for found in OPTIONS if found.kind in (int, float) and not found.rules.refused]
    switches = [found for found in OPTIONS if found.kind is bool and not found.rules.refused]
    words = [word for one in random.sample(numbers, random.randint(1, 4)) for word in (one.flag, random.choice(SMALL))]
    words += [one.flag for one in random.sample(switches, random.randrange(3))]
    texts = [found for found in OPTIONS if found.choices and found.kind is str]
    words += [
        word for one in random.sample(texts, random.randrange(3)) for word in (one.flag, random.choice(one.choices))
    ]
    if random.random() < 0.3:
        group, field = random.choice(["head", "ffn", "stem"]), random.choice(["cost", "floor", "quantum", "round_to"])
        words += ["--prune-groups", f"{group}.{field}={random.choice(SMALL)}"]
    if random.random() < 0.3:
        words += ["--data-path", *random.choice(shop.blends())]
    if random.random() < 0.3:
        fields = (
            "hf-model",
            "load",
            "save",
            "tokenizer-model",
            "tensorboard-dir",
            "data-cache-path",
            "valid-data-path",
        )
        words += [f"--{random.choice(fields)}={random.choice(shop.places())}"]
    if random.random() < 0.4:
        changes = [
            "",
            "--ckpt-step=14",
            "--ckpt-step=3",
            "--finetune",
            "--no-load-optim",
            "--split=70,30,0",
            "--seed=2",
        ]
        words += ["--load", shop.run, *filter(None, [random.choice(changes)])]
    return words


def is_affordable(words):
    """Whether a run that is accepted could do its first step here in a blink."""
    try:
        config = load_config([str(word) for word in words])
    except UserError:
        return True
    tokens = config.tokens_per_iteration * max(1, config.training.eval_iters if config.training.eval_interval else 1)
    quanta = [group.quantum or 1 for group in config.pruning.groups.values()]
    widest = max(config.model.make_vocab_size_divisible_by, *quanta)
    return tokens < 100_000 and widest < 10**5 and config.pruning.second_order.calibration_tokens < 10**6


def folder_of(place):
    """`place`, made anew and empty."""
    shutil.rmtree(place, ignore_errors=True)
    Path(place).mkdir(parents=True)
    return Path(place)


COMMANDS_HERE = {
    "convert-from-hf": lambda shop, room: ["--hf-model", shop.tiny.source, "--save", room / "o"],
    "convert-from-megatron": lambda shop, room: ["--load", shop.run, "--save", room / "o"],
    "convert-to-hf": lambda shop, room: ["--load", shop.run, "--save", room / "o"],
    "convert-to-gguf": lambda shop, room: ["--hf-model", shop.hf, "--save", room / "o.gguf"],
    "evaluate": lambda shop, room: [
        *("--hf-model", shop.hf, "--data-path", shop.text, "--device", "cpu"),
        *("--eval-samples", "1", "--seq-length", "32"),
    ],
    "inspect": lambda shop, room: ["--load", shop.run],
    "score": lambda shop, room: [*shop.tiny.arguments(room / "o")[:-4], "--batches", "1"],
    "prune-once": lambda shop, room: [*shop.tiny.arguments(room / "o")[:-2], "--batches", "1"],
    "token-scaling": lambda shop, room: ["--runs", shop.run, "--output-dir", room / "o"],
    "report": lambda shop, room: ["--runs", shop.run, "--output", room / "r.html"],
    "convert-to-megatron": lambda shop, room: ["--load", shop.run, "--save", room / "o"],
    "preprocess": lambda shop, room: [
        *("--input", shop.text, "--output-prefix", room / "p"),
        *("--tokenizer-model", shop.tiny.folder / "tokenizer.model"),
    ],
}
"""Command -> words of a use that is right."""

WRITERS = {
    **{name: way for name, way in COMMANDS_HERE.items() if name not in ("evaluate", "inspect", "score")},
    "convert-from-megatron": lambda shop, room: ["--load", shop.megatron, "--save", room / "o"],
    "convert-from-hf, GGUF": lambda shop, room: [
        *("--gguf", shop.gguf, "--hf-model", room / "o", "--save", room / "run")
    ],
    "convert-to-hf, shards": lambda shop, room: [
        *("--load", shop.run, "--save", room / "o", "--max-shard-size", "10KB", "--kv-policy", "cluster")
    ],
    "evaluate": lambda shop, room: [*COMMANDS_HERE["evaluate"](shop, room), "--output-dir", room / "e"],
    "inspect": lambda shop, room: ["--load", shop.run, "--plot", room / "i.png"],
    "score": lambda shop, room: [
        *(*shop.tiny.arguments(room / "o")[:-4], "--batches", "1", "--json", room / "s.json", "--plot", room / "s.png")
    ],
    "recipe": lambda shop, room: ["--load", shop.run, "--output", room / "recipe.json"],
    "measure-latency": lambda shop, room: [
        *("--hf-model", shop.tiny.source, "--save", room / "t.json", "--repeats", "1", "--prompt-length", "4"),
        *("--decoded-tokens", "2"),
    ],
    "pretrain": lambda shop, room: shop.tiny.arguments(room / "o", "--on-save-error", "stop"),
    "pretrain, cache": lambda shop, room: shop.tiny.arguments(
        shop.folder / "room" / "o", "--data-cache-path", room / "cache", "--exit-interval", "1"
    ),
    "pretrain, TensorBoard": lambda shop, room: shop.tiny.arguments(
        shop.folder / "room" / "o", "--tensorboard-dir", room / "tb", "--exit-interval", "1"
    ),
}
"""The same, writing whatever they can write into `room`; what comes after a comma tells several of a command apart."""


def wrong_command(random, shop, room):
    """A command with one or two more options, mostly wrong ones; sometimes cut short or with a word too many."""
    name = random.choice(list(COMMANDS_HERE))
    words = [str(word) for word in COMMANDS_HERE[name](shop, room)]
    for found in random.choices(_own_options(name), k=random.randint(1, 2)):
        is_place = (found.metavar or "") in ("DIR", "FILE", "PATH", "P")
        value = str(random.choice(shop.places())) if is_place and random.random() < 0.8 else random.choice(VALUES)
        if found.name == "workers":  # as many processes
            value = random.choice(["-1", "0", "1", "nan", ""])
        words += [found.flag] if found.kind is bool else [f"{found.flag}={value}"]
    if random.random() < 0.1:
        words = words[: random.randrange(len(words) + 1)]
    if random.random() < 0.05:
        words.insert(random.randrange(len(words) + 1), random.choice(VALUES))
    return [name, *words]


def _own_options(name):
    module = importlib.import_module(COMMANDS[name][0])
    own = [kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == module.__name__]
    return options_of(next(kind for kind in own if kind.__name__.endswith("Options")), "own")


# Files that are something else ----------------------------------------------------------------------------------------


class TookTooLongError(BaseException):
    """A command waits, or reads without an end."""


@contextlib.contextmanager
def at_most(seconds):
    """What is entered longer is ended by TookTooLongError."""

    def end(*_):
        raise TookTooLongError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _sparse(path):
    with path.open("wb") as file:
        file.truncate(1 << 42)


def _mutated(random, path, content):
    content = bytearray(content)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(content) + 1)
        content[at : at + random.choice([0, 1, 1, 1, 8])] = random.randbytes(random.choice([0, 1, 1, 1, 8]))
    path.write_bytes(content)


STRANGE = {
    "pipe": lambda path: os.mkfifo(path),
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path.name),
    "nowhere": lambda path: path.symlink_to("../blobs/0123abcd"),
    "folder": lambda path: path.mkdir(),
    "empty": lambda path: path.touch(),
    "sparse": _sparse,
    "deep": lambda path: path.write_text("[" * 100_000),
    "deep object": lambda path: path.write_text('{"a":' * 100_000),
    "null": lambda path: path.write_text("null"),
    "many digits": lambda path: path.write_text('{"a": ' + "9" * 6000 + "}"),
    "other values": lambda path: path.write_text('{"a": NaN, "\\u001b[31m": "\\u001b[2J"}'),
    "no text": lambda path: path.write_bytes(b'{"a": "\xff\xfe"}'),
    "mark first": lambda path: path.write_bytes(b'\xef\xbb\xbf{"a": 1}'),
    "noise": lambda path: path.write_bytes(bytes(range(256))),
}
_SPARE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "merges.txt")
_SPARE += ("chat_template.json", "generation_config.json", "additional_chat_templates/a.jinja", "README.md")
_SPARE += ("model.safetensors.index.json", "pytorch_model.bin", "vocab.json", "writer.lease-3", "launch_status.json")


def strange_file(random, shop, room):
    """A command's words, and what was put in the place of one of the files that they name, in words."""
    ways = {name: way(shop, room) for name, way in COMMANDS_HERE.items()}
    ways["pretrain"] = shop.tiny.arguments(room / "o")
    ways["convert-from-hf, GGUF"] = ["--gguf", shop.gguf, "--hf-model", room / "o"]
    name = random.choice(list(ways))
    words = [str(word) for word in ways[name]]
    named = [n for n, word in enumerate(words) if word.startswith(f"{shop.folder}/") and not word.startswith(str(room))]
    number = random.choice([n for n in named if not words[n].endswith("/cache")])
    given, place = Path(words[number]), room / "given"
    place.mkdir()
    if given.is_dir():
        shutil.copytree(given, place / given.name)
    else:
        for file in given.parent.glob(f"{given.name}*"):
            shutil.copyfile(file, place / file.name)
    words[number] = str(place / given.name)
    present = sorted(path for path in place.rglob("*") if path.is_file() and "tfevents" not in path.name)
    absent = [place / given.name / spare for spare in _SPARE] if given.is_dir() else []
    file = random.choice(present if random.random() < 0.7 or not absent else absent)
    content = file.read_bytes() if file.exists() else b"{}"
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    how = random.choice([*STRANGE, *["changed"] * 4])
    if how == "changed":
        _mutated(random, file, content)
    else:
        STRANGE[how](file)
    return [name.partition(",")[0], *words], f"{file.relative_to(place)}: {how}"
