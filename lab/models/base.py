"""What every rung shares: the interface, the loss that skips padding, and contexts cut from packed documents."""

import torch.nn.functional as F
from torch import Tensor, nn

MARK = 0  # the token that opens a document and, as a target, ends it; every lab vocabulary keeps it at 0
IGNORE = -100  # a target that is not scored: padding at the end of a packed row


def mean_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross-entropy in nats over the targets that are not IGNORE (a 0-d float32 tensor)."""
    return F.cross_entropy(logits_BTV.flatten(0, -2).float(), targets_BT.flatten(), ignore_index=IGNORE)


def windows(idx_BT: Tensor, length: int, mark: int = MARK) -> Tensor:
    """The last `length` tokens at every position, (B, T, length), the newest last.

    Rows are packed documents, each opened by `mark`. Whatever lies before the row, or before the newest mark
    of the window, belongs to nothing the position may see and reads `mark`: the familiar contexts '...',
    '..e', '.em'.
    """
    padded = F.pad(idx_BT, (length - 1, 0), value=mark)
    window = padded.unfold(1, length, 1)
    is_mark = (window == mark).int()
    # marks at or after a place, minus the place itself: any mark strictly after it hides it
    marks_after = is_mark.flip(-1).cumsum(-1).flip(-1) - is_mark
    return window.masked_fill(marks_after > 0, mark)


class LanguageModel(nn.Module):
    """A rung of the ladder. Subclasses set `vocab_size` and `context` (tokens looked at; None: all there
    are) and define `logits`. Row b, position t sees tokens 0..t of its row, back to the newest mark, and
    predicts token t+1."""

    vocab_size: int
    context: int | None
    residual = False  # the modules of `activations` read a stream and put out the same with something added

    def logits(self, idx_BT: Tensor, counted_BT: Tensor | None = None) -> Tensor:
        """Next-token logits (B, T, V), float32. `counted_BT`: the places that count where a batch's statistics are
        taken (None: all); padding must not move them. Only batch norm looks at it."""
        raise NotImplementedError

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, V) and the mean loss in nats over targets that are not IGNORE (None without targets)."""
        logits = self.logits(idx, None if targets is None else targets != IGNORE)
        return logits, None if targets is None else mean_loss(logits, targets)

    def token_embeddings(self) -> list[nn.Module]:
        """The modules that turn token ids into vectors; attribution interpolates their outputs. Empty for
        a table of counts, which has no gradient to follow."""
        return []

    def activations(self) -> list[tuple[str, nn.Module]]:
        """Named modules whose outputs the diagnostics draw (squashing layers, blocks), in order of depth; empty where
        there are none that are called one by one."""
        return []

    def readout(self, x_BTE: Tensor) -> Tensor | None:
        """Logits of what a module of `activations` puts out, as if the model ended there; None where its width is
        not the one that the output layer reads."""
        return None

    def rows_of_several_tokens(self) -> dict[str, int]:
        """{table: how many tokens pick a row of it}: embeddings whose rows belong to no single token."""
        return {}

    def num_parameters(self) -> int:
        """Trainable numbers in the model."""
        return sum(p.numel() for p in self.parameters())
