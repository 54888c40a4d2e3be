"""What the runs of variants have to do in one pass: their records, their common list of work; without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jobs.captioning.record import RunRecord, load_run_record
from jobs.captioning.work import list_work, open_record
from smallcap import storage
from smallcap.config import CaptionConfig
from smallcap.errors import ConfigError
from smallcap.images.crops import CropPlan
from smallcap.images.work_list import WorkList, copy_work_list, load_markers, update_work_list
from smallcap.model.encoder_spec import load_crop_plan
from smallcap.output.coverage import WorkItem
from smallcap.output.part_files import RUN_FILE
from smallcap.output.variant_runs import VariantsRecord, load_variants
from smallcap.variant_options import Variant


@dataclass(frozen=True)
class VariantRun:
    """A variant, with its record and what it lacks."""

    variant: Variant
    record: RunRecord
    items: Sequence[WorkItem] = ()

    @property
    def config(self) -> CaptionConfig:
        """All its options."""
        return self.variant.config

    @property
    def out(self) -> str:
        """Its folder."""
        return self.config.out

    def with_record(self, **changes: object) -> VariantRun:
        """Returns it with changes of its record."""
        return replace(self, record=self.record.model_copy(update=changes))


def open_runs(config: CaptionConfig, variants: Sequence[Variant]) -> list[VariantRun]:
    """Continues or begins the variants' runs: those that retrieve first, and of them those that are there already.

    Raises:
        ConfigError: The folder holds another run, or the variants cannot be captioned together.
    """
    if storage.exists(storage.join(config.out, RUN_FILE)):
        raise ConfigError(
            "The output folder holds a run without variants.", where=config.out, remedy="Give another --out."
        )

    def order(variant: Variant) -> tuple[bool, bool]:
        return variant.config.retrieval.k == 0, load_run_record(variant.config.out) is None

    runs: list[VariantRun] = []
    for variant in sorted(variants, key=order):
        record = open_record(variant.config, runs[0].record if runs else None)
        runs.append(VariantRun(variant, record))
        _check_fits(runs[-1], runs[0])
    return runs


def _crops(run: VariantRun) -> CropPlan:
    config = run.config
    return load_crop_plan(config.model, run.record.retrieval_encoder, config.input.decode, config.retrieval.cache_dir)


def _check_fits(one: VariantRun, first: VariantRun) -> None:
    """Checks that a variant shares with the first one what an actor has only once.

    Raises:
        ConfigError: Another version of the index, another retrieval encoder, or crops of other sizes.
    """
    pins: dict[str, list[str | None]] = {
        "index version": [run.record.index_id for run in (first, one)],
        "retrieval encoder": [run.record.retrieval_encoder for run in (first, one)],
        "crops": [str(_crops(run)) for run in (first, one)],
    }
    if one.config.retrieval.k == 0:
        del pins["index version"]
    for what, (expected, found) in pins.items():
        if expected != found:
            raise ConfigError(
                "These variants cannot be captioned in one pass.",
                where=one.out,
                expected=f"the {what} of {first.variant.name}: {expected}",
                found=str(found),
                remedy=f"Caption {one.variant.name} in a run of its own.",
            )


def list_together(runs: Sequence[VariantRun], relist: bool) -> WorkList:
    """Lists the input for all variants, or loads their list, which the newest of them has whole.

    Raises:
        ConfigError: The variants have different lists.
    """
    markers = {one.out: load_markers(one.out) if one.record.attempts else [] for one in runs}
    owner = max(runs, key=lambda one: len(markers[one.out]))
    for one in runs:
        if markers[one.out] != markers[owner.out][: len(markers[one.out])]:
            raise ConfigError(
                "The variants have listed different images.",
                where=one.out,
                expected=f"the list of {owner.out}",
                remedy=f"Caption {one.variant.name} in a run of its own.",
            )
    others = [one for one in runs if one is not owner]
    begun = [(one.out, one.record) for one in others if one.record.attempts]
    work = list_work(owner.config, owner.record, relist, begun)
    for one in others:
        if not one.record.attempts:
            copy_work_list(owner.out, one.out)
        elif relist or markers[one.out] != markers[owner.out]:
            update_work_list(owner.out, one.out)
    return work


def write_names(out: str, variants: Sequence[Variant]) -> None:
    """Records the variants' names, after those that are recorded."""
    known = load_variants(out)
    names = tuple(dict.fromkeys((*known, *(variant.name for variant in variants))))
    if names != known:
        VariantsRecord(variants=names).write_to(out)
