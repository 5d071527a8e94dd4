"""The `rheostat` command: its words become a verb's arguments, and errors one line.

Exit codes: 0 done; 1 interrupted; 2 something the user can put right, said in one line on stderr.
"""

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_origin

import tyro
from pydantic import BaseModel

from rheostat import __version__
from rheostat.commands import VERBS, plan_of
from rheostat.config import build, merged, read_toml
from rheostat.console import Console
from rheostat.errors import ConfigError, RheostatError


def usage() -> str:
    """The overview that `rheostat --help` prints."""
    lines = [f"  {name:<16} {' '.join((verb.__doc__ or '').split())}" for name, (verb, _) in VERBS.items()]
    return "\n".join(
        [
            "usage: rheostat VERB [options]",
            "",
            "Learns how to sample from a frozen language model.",
            "",
            *lines,
            "",
            "'rheostat VERB --help' lists a verb's options. All verbs take --config FILE.toml (fields as the options,",
            "nested ones as tables; of several files later ones win, and options over all), --json, and --debug for a",
            "traceback. demo, train sequence, train token, evaluate and select take --dry-run: what they would sample.",
        ]
    )


def _split_verb(words: list[str]) -> tuple[str, list[str]]:
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in VERBS:
            return name, words[length:]
    given = words[0] if words else ""
    if given == "train":
        raise ConfigError(
            "train: say what: 'rheostat train sequence', 'rheostat train token' or 'rheostat train autodeco'"
        )
    raise ConfigError(f"unknown verb {given!r}: use one of {', '.join(VERBS)} ('rheostat --help' explains them)")


def _take_option(words: list[str], option: str) -> tuple[list[str], list[str]]:
    """The values of every ``--option VALUE`` or ``--option=VALUE``, and the words without them."""
    values, rest, left = [], [], iter(words)
    for word in left:
        if word == option:
            value = next(left, None)
            if value is None:
                raise ConfigError(f"{option}: name a file")
            values.append(value)
        elif word.startswith(f"{option}="):
            values.append(word.partition("=")[2])
        else:
            rest.append(word)
    return values, rest


def _require_once(verb: type[BaseModel], words: list[str]) -> None:
    """Given twice, the last option counts, as everywhere; of one that takes several values the first would be lost."""
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    for name, field in verb.model_fields.items():
        option = f"--{name.replace('_', '-')}"
        if get_origin(field.annotation) is tuple and options.count(option) > 1:
            raise ConfigError(f"{option} is given twice: write its values one after another, {option} A B")


def parse(name: str, words: list[str]) -> BaseModel:
    """A verb's arguments from ``--config`` files, of which later ones win, and the options, which win over all.

    Raises:
        ConfigError: anything wrong with them, in one line.
    """
    verb = VERBS[name][0]
    files, words = _take_option(words, "--config")
    _require_once(verb, words)
    given: dict[str, Any] = {}
    for file in files:
        given = merged(given, read_toml(Path(file)))
    fields = build(verb, given, f"--config {' '.join(files)}") if files else None
    said, asked = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(asked):
            return tyro.cli(
                verb,
                args=words,
                prog=f"rheostat {name}",
                default=fields if fields is not None else tyro.MISSING_NONPROP,
                config=(tyro.conf.EnumChoicesFromValues,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            print(asked.getvalue(), end="")
            raise
        raise ConfigError(_one_line(said.getvalue(), name)) from None


def _one_line(box: str, verb: str) -> str:
    """What tyro says in a box, as a line: the text between its first and its second rule."""
    parts = re.split(r"^ *-{8,} *$", box, flags=re.MULTILINE)
    message = " ".join((parts[1] if len(parts) > 1 else box).split()).removeprefix("Error parsing ")
    pydantic = re.search(r"1 validation error for \w+ (.*?) ?(?:Value error, |Input should )(.*?) \[type=", message)
    if pydantic:
        owner = message.partition(":")[0]
        parts = [*([] if owner == VERBS[verb][0].__name__ else [owner]), *pydantic[1].split()]
        where = f"--{'.'.join(parts).replace('_', '-')}: " if parts else ""
        message = where + ("should " if "Input should" in message else "") + pydantic[2]
    return f"{message} ('rheostat {verb} --help' lists the options)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    console = Console()
    # The Rust tokenizers warn about forks of ours that never use them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        if words[:1] == ["--version"]:
            print(f"rheostat {__version__}")
            return 0
        if not words or words[0] in ("-h", "--help"):
            print(usage())
            return 0
        name, rest = _split_verb(words)
        arguments = parse(name, rest)
        planned = getattr(arguments, "dry_run", False)
        result = plan_of(arguments) if planned else VERBS[name][1](arguments, console)
        if getattr(arguments, "json_output", False):
            print(json.dumps(result, indent=1))
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        if debug:
            raise
        console.say("interrupted: what was finished is stored, the same command continues it")
        return 1
    except RheostatError as error:
        if debug:
            raise
        console.say(f"error: {' '.join(str(error).split())}")
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
