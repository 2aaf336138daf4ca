"""Code that keeps a layer's output or hands it to others."""

import collections
import contextlib
import dataclasses
import io
import sys
import types
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from support.situations import Activated, X


class Stored(Activated):
    def forward(self, x: Tensor) -> Any:
        self.pre = self.fc(x)
        return self.act(self.pre)

    fuses = False

    def use(self) -> Any:
        return self(X), self.pre


class StoredToo(Activated):
    def forward(self, x: Tensor) -> Any:
        self.pre = h = self.fc(x)
        return self.act(h)

    fuses = False

    def use(self) -> Any:
        return self(X), self.pre


class InAList(Activated):
    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)
        self.seen.append(h)
        return self.act(h)

    fuses = False

    def use(self) -> Any:
        return self(X), self.seen


class InADictionary(Activated):
    def before(self) -> None:
        self.store: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Any:
        self.store["pre"] = h = self.fc(x)
        return self.act(h)

    fuses = False

    def use(self) -> Any:
        return self(X), self.store


class InADeque(Activated):
    def before(self) -> None:
        self.last: Any = collections.deque(maxlen=2)

    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)
        self.last.append(h)
        h = self.act(h)
        return h

    fuses = False

    def use(self) -> Any:
        return self(X), list(self.last)


class InAGlobal(Activated):
    def forward(self, x: Tensor) -> Any:
        global LAST
        LAST = self.fc(x)
        return self.act(LAST)

    fuses = False

    def use(self) -> Any:
        return self(X), LAST


LAST: Any = None


class Namespace(Activated):
    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)
        return types.SimpleNamespace(pre=h, post=self.act(h))

    fuses = False

    def use(self) -> Any:
        result = self(X)
        return result.pre, result.post


@dataclasses.dataclass
class Output:
    pre: Any
    post: Any = None


class Dataclass(Activated):
    def forward(self, x: Tensor) -> Any:
        output = Output(self.fc(x))
        output.post = self.act(output.pre)
        return output

    fuses = False

    def use(self) -> Any:
        result = self(X)
        return result.pre, result.post


class Closure(Activated):
    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)
        return self.act(h), lambda: h

    fuses = False

    def use(self) -> Any:
        y, later = self(X)
        return y, later()


class Dictionary(Activated):
    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)
        return {"pre": h, "post": self.act(h)}

    fuses = False

    def use(self) -> Any:
        return self(X)


class Printed(Activated):
    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)
        self.seen.append(float(h.min()))
        with contextlib.redirect_stdout(io.StringIO()) as text:
            print(f"{h.mean():.1f}")
        self.text = text.getvalue()
        return self.act(h)

    fuses = False

    def use(self) -> Any:
        return self(X), torch.tensor(self.seen)


class Weak(Activated):
    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)
        reference = weakref.ref(h)
        y = self.act(h)
        return y, reference()

    fuses = False

    def use(self) -> Any:
        return self(X)


class LocalVariables(Activated):
    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)
        y = self.act(h)
        return y, locals()["h"]

    fuses = False

    def use(self) -> Any:
        return self(X)


class FrameOfItself(Activated):
    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)
        y = self.act(h)
        return y, sys._getframe().f_locals["h"]

    fuses = False

    def use(self) -> Any:
        return self(X)


class Evaluated(Activated):
    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)
        y = self.act(h)
        return y, eval("h")

    fuses = False

    def use(self) -> Any:
        return self(X)


class Deleted(Activated):
    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)
        y = self.act(h)
        del h
        self.seen.append(y)
        return y

    fuses = False

    def use(self) -> Any:
        return self(X), self.seen


class NumpyMemory(Activated):
    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)
        memory = h.detach().numpy()
        return self.act(h), torch.from_numpy(np.array(memory))

    fuses = False

    def use(self) -> Any:
        return self(X)


class ResidualOfTheOutput(Activated):
    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)
        return h + self.act(h)

    fuses = False

    def use(self) -> Any:
        return self(X)


class GatedByItself(Activated):
    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)
        return h * self.act(h), self.act(h) * h

    fuses = False

    def use(self) -> Any:
        return self(X)


class ReturnedTwice(Activated):
    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)
        return (h,) * 2, self.act(h)

    fuses = False

    def use(self) -> Any:
        return self(X)


class Asserted(Activated):
    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)
        assert h.isfinite().all()
        self.negative = (h < -1).sum()
        return self.act(h)

    fuses = False

    def use(self) -> Any:
        return self(X), (self.negative > 0).float()


class InPlaceActivation(Activated):
    """The activation changes the layer's output, so both names hold the result."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)
        y = self.act(h)
        return y, h, self.act(self.fc(x))

    def use(self) -> Any:
        return self(X)


class InPlaceUsed(Activated):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)
        view = h[:2]
        self.act(h)
        return h, view

    fuses = False

    def use(self) -> Any:
        return self(X)


class NotANumber(Activated):
    def use(self) -> Any:
        x = X.clone()
        x[0, 0], x[1, 1] = float("nan"), float("inf")
        return self(x)


class Empty(Activated):
    def use(self) -> Any:
        return self(X[:0]).shape, self(X)


class OtherTypes(Activated):
    trains = False
    modes = ("no_grad", "inference_mode")

    def use(self) -> Any:
        half = X.bfloat16()
        return (
            (self(nn.Parameter(X)), self.fc(nn.Parameter(X))),
            self.act(half),
            self.act(X.double()),
        )
