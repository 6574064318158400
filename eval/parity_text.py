"""Parity of the text side: token ids, script entries, and the word/action machine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dia2_jax.generation.machine import QueueBuilder, init_state, process
from dia2_jax.text.machine import Machine
from dia2_jax.text.script import Entry, parse_script
from eval.parity_checks import Checks
from eval.parity_folder import Golden

#: Constants of the recording that nothing here reads: the filler of upstream's code grid.
_FOREIGN = {"ungenerated"}


def check_text(golden: Golden, checks: Checks) -> None:
    """Everything under ``golden.json``'s ``text``."""
    parts: dict[str, Callable[[Golden, Any, Checks], None]] = {
        "constants": _constants,
        "strings": _strings,
        "scripts": _scripts,
        "traces": _traces,
    }
    found: dict[str, Any] = {}
    with checks.guard("text"):
        found = dict(golden.text)
    for name, check in parts.items():
        if name not in found:
            checks.absent(f"text: {name}")
            continue
        with checks.guard(f"text: {name}"):
            check(golden, found[name], checks)
    for name in sorted(set(found) - set(parts) - {"frame_rate"}):
        checks.unread(f"text: {name}", "unknown part")


def read_entries(recorded: list[dict[str, Any]]) -> list[Entry]:
    """Entries from their JSON form."""
    return [Entry(tuple(e["tokens"]), e["text"], e["padding"]) for e in recorded]


def _constants(golden: Golden, constants: dict[str, int], checks: Checks) -> None:
    ids = vars(golden.tokenizer.ids)
    pairs = [(key, ids.get(key), value) for key, value in constants.items() if key not in _FOREIGN]
    checks.equal("text: constants", pairs)


def _strings(golden: Golden, strings: list[dict[str, Any]], checks: Checks) -> None:
    checks.equal(
        "text: strings",
        [(repr(s["text"]), golden.tokenizer.encode(s["text"]), s["ids"]) for s in strings],
    )


def _scripts(golden: Golden, scripts: list[dict[str, Any]], checks: Checks) -> None:
    pairs = []
    for index, script in enumerate(scripts):
        ours = parse_script(
            script["lines"],
            golden.tokenizer,
            frame_rate=golden.frame_rate,
            split_sound_tags=True,  # the recording cuts them as upstream does
        )
        pairs.append((f"script {index}", ours, read_entries(script["entries"])))
    checks.equal("text: scripts", pairs)


def _traces(golden: Golden, traces: list[dict[str, Any]], checks: Checks) -> None:
    scripts = [read_entries(script["entries"]) for script in golden.text["scripts"]]
    for name, run in (("specification", _run_specification), ("arrays", _run_arrays)):
        with checks.guard(f"text: traces, {name}"):
            pairs = []
            for index, ours in enumerate(run(golden, traces, scripts)):
                recorded = {key: traces[index][key] for key in ours}
                recorded["consumed"] = [bool(taken) for taken in recorded["consumed"]]
                recorded["transcript"] = [tuple(word) for word in recorded["transcript"]]
                pairs += [(f"trace {index} {key}", ours[key], recorded[key]) for key in ours]
            checks.equal(f"text: traces, {name}", pairs)


def _run_specification(
    golden: Golden, traces: list[dict[str, Any]], scripts: list[list[Entry]]
) -> list[dict[str, Any]]:
    results = []
    for trace in traces:
        machine = Machine(
            golden.tokenizer.ids, trace["ahead"], trace["max_padding"], trace["initial_padding"]
        )
        state = machine.new_state(scripts[trace["script"]])
        steps = enumerate(zip(trace["actions"], trace["forced"], strict=True))
        out = [
            machine.process(state, step, action, bool(forced)) for step, (action, forced) in steps
        ]
        results.append(
            {
                "main": [o.main for o in out],
                "second": [o.second for o in out],
                "consumed": [o.consumed is not None for o in out],
                "end_step": state.end_step,
                "transcript": state.transcript,
            }
        )
    return results


def _run_arrays(
    golden: Golden, traces: list[dict[str, Any]], scripts: list[list[Entry]]
) -> list[dict[str, Any]]:
    """All traces of one look-ahead as rows of one compiled run, filled up to equal lengths."""
    steps = max(len(trace["actions"]) for trace in traces)

    def column(key: str) -> np.ndarray:
        rows = [np.resize(trace[key], steps) for trace in traces]
        return np.array(rows, np.int32)

    actions, forced = column("actions"), column("forced").astype(bool)
    single = {
        key: np.array([trace[key] for trace in traces], np.int32)
        for key in ("max_padding", "initial_padding")
    }
    results: list[dict[str, Any]] = [{} for _ in traces]
    for ahead in sorted({trace["ahead"] for trace in traces}):
        rows = [index for index, trace in enumerate(traces) if trace["ahead"] == ahead]
        builders = []
        for index in rows:
            builder = QueueBuilder(steps, ahead)
            builder.append(scripts[traces[index]["script"]])
            builder.close()
            builders.append(builder)
        queues = jax.tree.map(lambda *leaves: np.stack(leaves), *[b.arrays() for b in builders])

        def trace_row(
            queue: Any, actions: Any, forced: Any, padding: Any, most: Any, ahead: int = ahead
        ) -> Any:
            step_of = functools.partial(
                process, ids=golden.tokenizer.ids, ahead=ahead, max_padding=most
            )

            def one(state: Any, item: Any) -> Any:
                step, action, force = item
                state, output = step_of(state, queue, step, action, forced=force)
                return state, (output, state.end_step)

            return jax.lax.scan(one, init_state(padding), (jnp.arange(steps), actions, forced))[1]

        # Integers only, run once: the compiler need not try.
        quick = {"xla_backend_optimization_level": 0}
        output, end_step = jax.device_get(
            jax.jit(jax.vmap(trace_row), compiler_options=quick)(
                queues,
                actions[rows],
                forced[rows],
                single["initial_padding"][rows],
                single["max_padding"][rows],
            )
        )
        for row, (index, builder) in enumerate(zip(rows, builders, strict=True)):
            length = len(traces[index]["actions"])
            end = int(end_step[row, length - 1])
            words = output.word[row, :length]
            results[index] = {
                "main": output.main[row, :length].tolist(),
                "second": output.second[row, :length].tolist(),
                "consumed": output.consumed[row, :length].tolist(),
                "end_step": None if end < 0 else end,
                "transcript": [
                    (builder.words[word], step) for step, word in enumerate(words) if word >= 0
                ],
            }
    return results
