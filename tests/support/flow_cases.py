"""What functions do with modules and results, as short texts; standard library only.

A line names a call and what it gets, or a use: ``norm(conv)``, ``returns norm``. The result of a
call has the name of the call, with its age in a loop if it is not new.
"""

from __future__ import annotations

from collections.abc import Iterator

from torchquant.graph.flow import flow_of
from torchquant.graph.flow_values import (
    Argument,
    At,
    Attribute,
    Each,
    Named,
    Result,
    Site,
    parts_of,
)

# Source of a method with the arguments self, x -> what it does.
CASES: dict[str, set[str]] = {
    "return self.norm(self.conv(x))": {"conv(x)", "norm(conv)", "returns norm"},
    "y = self.conv(x)\ny = self.norm(y)\nreturn y": {"conv(x)", "norm(conv)", "returns norm"},
    "y = self.conv(x)\nif x: y = self.norm(y)\nreturn y": {
        *("conv(x)", "norm(conv)", "returns conv", "returns norm", "tests x"),
    },
    "return self.a(x) if x else self.b(self.a(x))": {
        *("a(x)", "b(a)", "returns a", "returns b", "tests x"),
    },
    "y = self.conv(x)\nreturn relu(self.norm(y)), y": {
        *("conv(x)", "norm(conv)", "relu(norm)", "returns relu", "returns conv"),
    },
    "return self.conv(x).relu()": {"conv(x)", "conv.relu()", "returns conv.relu"},
    "return self.conv(x) + x": {"conv(x)", "computes with conv", "computes with x"},
    "self.y = self.conv(x)": {"conv(x)", "stores as y conv", "sets y"},
    "return self.conv(x, y=self.fc(x))": {"conv(x; fc)", "fc(x)", "returns conv"},
    "return self.conv(*self.fc(x))": {"conv(?; fc)", "fc(x)", "returns conv"},
    "for layer in self.layers: x = layer(x)\nreturn x": {
        *("layers.each!(layers.each! next, x)", "returns x", "returns layers.each! last"),
    },
    "for i, layer in enumerate(self.layers):\n    x = layer(x)\n    if i == 2: save(x)\nreturn x": {
        *("layers.each!(layers.each! next, x)", "returns x", "returns layers.each! last"),
        "save(layers.each!)",
    },
    "for layer in self.layers:\n    if layer: continue\n    x = layer(x)\nreturn x": {
        *("layers.each(layers.each next, layers.each old, x)", "returns x"),
        *("returns layers.each last", "returns layers.each old", "asks about layers.each"),
    },
    "for a, b in zip(self.a, self.b): x = b(a(x))\nreturn x": {
        *("a.each(b.each next, x)", "b.each(a.each)", "returns x", "returns b.each last"),
    },
    "for i in range(len(self.a)): x = self.b[i](self.a[i](x))\nreturn x": {
        *("len(a)", "a.each(b.each next, x)", "b.each(a.each)", "returns x"),
        *("returns b.each last", "iterates over len"),
    },
    "return self.layers[1](self.layers['a'](x))": {
        "layers.a(x)",
        "layers.1(layers.a)",
        "returns layers.1",
    },
    "return self.layers[x](x)": {"layers.some(x)", "uses as a key x", "returns layers.some"},
    "return self.layers[:2](x)": {"layers[start](x)", "returns layers[start]"},
    "return self.layers[2:](x)": {"layers[other](x)", "returns layers[other]"},
    "run = lambda y: self.conv(y)\nreturn run(x)": {"conv(x)", "returns conv"},
    "return getattr(self, 'conv')(getattr(self, x)(x))": {"some(x)", "conv(some)", "returns conv"},
    "return run(self.block, x)": {"run(block, x)", "returns run"},
    "with lock():\n    y = self.conv(x)\n    y = self.norm(y)\nreturn y": {
        *("lock()", "conv(x)", "norm(conv)", "returns norm", "uses lock"),
    },
    "y = self.conv(x)\ntry: y = self.norm(y)\nexcept ValueError: pass\nreturn y": {
        *("conv(x)", "norm(conv)", "returns norm", "returns conv"),
    },
    "try:\n    return self.norm(self.conv(x))\nfinally: done()": {
        *("conv(x)", "norm(conv)", "returns norm", "done()"),
    },
    "while x: x = self.conv(x)\nreturn x": {
        *("conv(conv, x)", "returns x", "returns conv", "tests x", "tests conv"),
    },
    "if self.there is not None: x = self.there(x)\nreturn x": {
        *("asks about there", "there(x)", "returns there"),
    },
    "if not self.there: return x\nreturn self.there(x)": {
        *("asks about there", "there(x)", "returns there"),
    },
    "if self.missing: x = self.missing(x)\nreturn x": {"asks about missing", "returns x"},
    "y = self.conv(x)\nprint(locals())\nreturn x": {
        *("conv(x)", "locals()", "print(locals)", "returns x"),
        "keeps in a variable that is looked up by name conv",
    },
}


def text(thing: object, names: dict[Site, str]) -> str:
    if isinstance(thing, At):
        steps = [_step(step) for step in thing.path]
        return ".".join(steps) + (f"[{thing.part}]" if thing.part else "")
    if isinstance(thing, Result):
        age = "" if thing.age == "new" else f" {thing.age}"
        return names.get(thing.site, "?") + age
    if isinstance(thing, Attribute):
        return f"{text(thing.of, names)}.{thing.name}"
    if isinstance(thing, Argument):
        return "x"
    return thing.name if isinstance(thing, Named) else ""


def _step(step: object) -> str:
    if isinstance(step, Each):
        return "some" if step.loop < 0 else "each"
    return str(getattr(step, "key", step))


def summary(source: str) -> set[str]:
    """What a method does, without what is done to things that are not followed."""
    scope: dict[str, object] = {}
    lines = "".join(f"    {line}\n" for line in source.splitlines())
    exec(f"def method(self, x):\n{lines}", scope)
    there = {("there",): True, ("missing",): False}
    flow = flow_of(scope["method"].__code__, there.get)  # type: ignore[attr-defined]
    names: dict[Site, str] = {}
    for _ in range(3):  # the name of a method has the name of the call before it
        for site, call in flow.calls.items():
            names[site] = "|".join(sorted(text(thing, names) for thing in call.callee))
            names[site] += "!" if site in flow.in_turn else ""
    found = set()
    for site, call in flow.calls.items():
        arguments = ", ".join(_all(argument, names) for argument in call.arguments)
        others = _all(call.others, names)
        open_count = "?" if -1 in call.counts else ""
        found.add(f"{names[site]}({arguments or open_count}{'; ' if others else ''}{others})")
    for thing, how in flow.uses:
        words = text(thing, names)
        if words and not isinstance(thing, Named):
            found.add(f"{how} {words}" if how != "sets" else f"sets {words}")
    return {line for line in found if not line.startswith((" ", "("))}


def _all(argument: object, names: dict[Site, str]) -> str:
    things: Iterator[object] = parts_of(argument)  # type: ignore[arg-type]
    return ", ".join(sorted(filter(None, (text(thing, names) for thing in things))))
