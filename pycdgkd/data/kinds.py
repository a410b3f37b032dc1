"""Names of the kinds of split (see ``splits``), for those that must not import numpy."""

KINDS = (
    "trial", "stratified", "stratified-subject", "trial-kfold", "per-subject", "loso",
    "subject-kfold", "stimulus", "stimulus-kfold",
)  # fmt: skip


def is_folded(kind: str) -> bool:
    """Whether a kind of split has several folds."""
    return kind in ("loso", "per-subject") or kind.endswith("-kfold")
