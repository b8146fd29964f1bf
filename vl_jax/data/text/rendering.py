"""Renders chat templates, as a program of its own: a line of JSON in, a line of JSON out.

    {"template": TEXT, "given": [{VARIABLE: VALUE}, ...]}  ->  {"results": [{"text"} or {"error"}, ...]}
                                                           or  {"error", "line"}: the template is none

A template is somebody else's program. It runs in a sandbox that can read what it is given and change nothing,
and this process bounds what it takes: processor time, memory, and the length of what it writes. So one
template cannot stop or exhaust whoever asks. The file imports nothing of the package, so that it starts fast.
"""

from __future__ import annotations

import datetime
import functools
import json
import sys
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 1  # of processor time that one line of input may take, at least; at most twice that
MEMORY = 256 << 20  # bytes beyond what the process takes at its start
OUTPUT = 4_000_000  # characters that one conversation may become


class _Generation(Extension):
    """``{% generation %}``: marks the part that a model wrote. Training masks need it; the text does not."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def answer(line: str) -> dict[str, Any]:
    """What one line of input is answered with."""
    job = json.loads(line)
    try:
        template = _compiled(job["template"])
    except jinja2.TemplateSyntaxError as error:
        return {"error": error.message or "wrong syntax", "line": error.lineno}
    except Exception as error:  # a template may be too large, or nested too deeply, for the compiler
        return {"error": _message(error), "line": None}
    return {"results": [_render(template, given) for given in job["given"]]}


def _render(template: jinja2.Template, given: dict[str, Any]) -> dict[str, str]:
    parts, length = [], 0
    try:
        for part in template.generate(**given):
            parts.append(part)
            length += len(part)
            if length > OUTPUT:
                return {"error": f"writes more than {OUTPUT} characters"}
    except Exception as error:  # a program of others raises what it likes, ``TypeError`` for one
        return {"error": _message(error)}
    return {"text": "".join(parts)}


def _message(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"takes more than {MEMORY >> 20} MiB of memory"
    return " ".join(str(error).split())[:300] or type(error).__name__


@functools.lru_cache(maxsize=8)
def _compiled(text: str) -> jinja2.Template:
    return environment().from_string(text)


def environment() -> ImmutableSandboxedEnvironment:
    """The language in which published templates are written: its options, functions and filters."""
    result = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    result.filters["tojson"] = _to_json
    result.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    return result


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter escapes what HTML would misread.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _limit_memory() -> None:
    """The process may grow by ``MEMORY``; a system without such limits has the time limit alone."""
    try:
        import resource
    except ImportError:
        return
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        now = MEMORY
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    bound = now + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (bound if hard < 0 else min(bound, hard), hard))


def _allow_seconds() -> None:
    """The process ends when it takes ``SECONDS`` more of processor time, even if nobody waits for it."""
    try:
        import resource
    except ImportError:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    bound = int(used.ru_utime + used.ru_stime) + 1 + SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (bound if hard < 0 else min(bound, hard), hard))


def main() -> None:
    """Answers line by line until the input ends."""
    _limit_memory()
    print("ready", flush=True)
    for line in sys.stdin:
        _allow_seconds()
        try:
            found = json.dumps(answer(line))
        except MemoryError as error:
            found = json.dumps({"error": _message(error), "line": None})
        print(found, flush=True)


if __name__ == "__main__":
    main()
