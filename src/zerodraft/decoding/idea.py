"""DiffuSpec in one file: greedy text from drafts that are filled in parallel, the same as without them.

No caches, no tree masks, no speed. `engine.py` does the same for any model of transformers; tests hold them together.

Idea: Li et al., "DiffuSpec: Unlocking Diffusion Language Models for Speculative Decoding", arXiv 2510.02358.
"""

from collections.abc import Callable

from torch import Tensor

Target = Callable[[list[int]], Tensor]
"""Logits `(vocabulary)` of the token after a text."""
Drafter = Callable[[list[int], int], Tensor]
"""Log-probabilities `(positions, vocabulary)` of the next tokens, each position blind to the others' choices."""
Proxy = Callable[[list[int]], Tensor]
"""Log-probabilities `(vocabulary)` of the next token, by a small causal model: it knows what goes together."""


def decode(target: Target, drafter: Drafter, proxy: Proxy, prompt: list[int], new: int) -> list[int]:
    """The prompt and `new` tokens more: those that plain greedy decoding writes."""
    text, length = [*prompt, int(target(prompt).argmax())], AdaptiveLength()
    while (left := len(prompt) + new - len(text)) > 0:
        k = min(length.next(), left - 1)
        paths = search(drafter(text, k), text, proxy)
        accepted = verify(target, text, {tuple(path[:n]) for path in paths for n in range(1, k + 1)})
        length.learn(k, len(accepted) - 1)
        text += accepted
    return text


def search(
    log_q: Tensor, text: list[int], proxy: Proxy, *, beam: int = 3, tau: float = 0.8, most: int = 15
) -> list[list[int]]:
    """Causal-consistency path search: the best ways through the drafted positions, by drafter and proxy alike."""
    paths: list[tuple[float, list[int]]] = [(0.0, [])]
    for row in log_q:
        scores, tokens = row.sort(descending=True, stable=True)
        # the fewest candidates that hold a share tau of the drafter's belief
        kept = min(int((scores.exp().cumsum(0) < tau).sum()) + 1, most)
        longer = []
        for total, path in paths:
            log_p = proxy(text + path)
            for score, token in zip(scores[:kept].tolist(), tokens[:kept].tolist(), strict=True):
                longer.append((total + 0.5 * score + 0.5 * float(log_p[token]), [*path, token]))
        paths = sorted(longer, key=lambda scored: -scored[0])[:beam]
    return [path for _, path in paths]


def verify(target: Target, text: list[int], tree: set[tuple[int, ...]]) -> list[int]:
    """The target's own tokens, as far as the tree foresaw them, and the one after. With a mask by which a node sees the
    nodes that lead to it, one pass of the target scores the whole tree."""
    own: tuple[int, ...] = ()
    while not own or own in tree:
        own += (int(target([*text, *own]).argmax()),)
    return list(own)


class AdaptiveLength:
    """As many positions as were lately of use, and some more while all were accepted."""

    def __init__(self, fewest: int = 20, most: int = 30, more: int = 10, rho: float = 0.5) -> None:
        self.fewest, self.most, self.more, self.rho = fewest, most, more, rho
        self.averages: tuple[float, float] | None = None

    def next(self) -> int:
        """Positions of the next draft."""
        drafted, accepted = self.averages or (0.0, -1.0)
        return min(max(int(drafted) + self.more * (accepted >= drafted), self.fewest), self.most)

    def learn(self, drafted: int, accepted: int) -> None:
        """Take note of a draft's length and of what the target accepted of it."""
        old = self.averages or (drafted, accepted)
        self.averages = old[0] + self.rho * (drafted - old[0]), old[1] + self.rho * (accepted - old[1])
