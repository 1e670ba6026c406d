"""Any source to array_record shards, once: what is asked for, what is there already, progress, and the manifest."""

import dataclasses
import os
import time

from mim_jax.clock import clock_text
from mim_jax.config import ConfigError, differences
from mim_jax.paths import expanded
from mim_jax.runs import same_data
from mim_jax.runs.lock import locked

BEGUN, EVERY = "begun.json", 10.0  # seconds between two lines
SHARD, MOST_SHARDS = 1000, 1024  # images in one, and how many shards, where nothing is said


@dataclasses.dataclass(frozen=True)
class Asked:
    """What `python -m mim_jax.prepare` was asked for. Raises ConfigError for what cannot be."""

    opening: dict  # the arguments of `data.sources.open_source`
    out: str
    name: str = ""  # of the split in `out`; "": that of the split without its slice
    stored: dict = dataclasses.field(default_factory=dict)  # shorter, format, quality
    shards: int = 0  # 0: one for every SHARD images, at most MOST_SHARDS
    workers: int = 1
    host: tuple[int, int] = (0, 1)  # which one this is, and of how many
    bad_limit: float = 0.1
    beam: tuple = ()  # the name of a runner of Apache Beam, which has the workers then, and its options

    def __post_init__(self):
        if "://" in self.out or not self.out:
            raise ConfigError(f"--out={self.out!r}: shards are written to a folder of this machine; copy it to a bucket then.")
        if not 0 <= self.host[0] < self.host[1]:
            raise ConfigError(f"--host={self.host[0]}/{self.host[1]}: hosts are 0/4, 1/4, 2/4 and 3/4, for four of them.")
        if self.workers < 1 or self.shards < 0:
            raise ConfigError(f"--workers={self.workers} --shards={self.shards}: one worker or more, and 0 shards to choose.")
        split = self.name or self.opening["split"].partition("[")[0]
        if not split.isidentifier():
            raise ConfigError(f"--name={split}: a split is called by one word, such as validation.")
        object.__setattr__(self, "name", split)

    def settings(self, stored, source) -> dict:
        """What must be the same for shards to be of one set; a source may have moved."""
        kept = {key: self.opening[key] for key in ("split", "columns", "folders", "holdout") if self.opening.get(key)}
        return {"images": stored.settings(), "shards": self.count(source), **kept}

    def count(self, source) -> int:
        return min(source.num_examples, self.shards or min(-(-source.num_examples // SHARD), MOST_SHARDS))


class Progress:
    """Prints how far a split is, and the time left; stops when too many images cannot be read."""

    def __init__(self, source, bad_limit: float, total: int, earlier):
        from mim_jax.data.unreadable import Reading

        self.source, self.total, self.done, self.first = source, total, 0, None
        self.reading = Reading(limit=bad_limit, met={i: tuple(row) for i, *row in earlier})
        self.reading.require_few(source)

    def tell(self, _, done: int, bad):
        self.done += done
        for i, *row in bad:
            self.reading.met[i] = tuple(row)
            print(f"left out, number {len(self.reading.met)}: {row[0]}: {row[1]}", flush=True)
        self.reading.require_few(self.source)
        now = time.monotonic()
        if self.first is None:  # until then the processes were starting
            self.first, self.said = (now, self.done), now
        if now - self.said > EVERY:
            self.said, rate = now, (self.done - self.first[1]) / (now - self.first[0])
            left = clock_text((self.total - self.done) / rate)
            share = f"{self.done}/{self.total}  {100 * self.done / self.total:5.1f} %"
            print(f"{self.source.split} {share}  {rate:8.1f} images/s  {left} left", flush=True)


def prepare(asked: Asked) -> dict | None:
    """Makes the shards that are missing -> the manifest; None where other hosts have yet to make theirs.

    Raises ConfigError: the source or the options cannot be used, `out` cannot be written, is in use, or was begun with other
    settings or on other data; too many images cannot be read.
    """
    from mim_jax.data import manifest
    from mim_jax.data.shard_writer import Stored
    from mim_jax.data.sources import open_source

    stored, pipeline = Stored(**asked.stored), _pipeline(*asked.beam) if asked.beam else None
    source = open_source(**asked.opening)
    out = expanded(asked.out)
    parts = out / manifest.PARTS.format(asked.name)
    if (out / "dataset_info.json").exists() and not any(out.glob(manifest.PARTS.format("*"))):
        raise ConfigError(f"--out={asked.out} holds a data set that mim_jax.prepare did not make: choose another.")
    try:
        own = parts / "host-{}-of-{}".format(*asked.host)
        own.mkdir(parents=True, exist_ok=True)
        with locked(own, "--out"):
            begun = _begun(asked, stored, source, parts)
            facts = _all_shards(asked, stored, source, out, parts, pipeline)
            if facts is None:
                return None
            return manifest.write_split(out, asked.name, begun, facts)
    except OSError as error:
        raise ConfigError(
            f"--out={asked.out} cannot be written: {error.strerror or error}; the same command goes on."
        ) from error


def _pipeline(runner, options):
    """-> a pipeline of Apache Beam, still empty. Raises ConfigError where it is not installed."""
    try:
        from mim_jax.data import shard_pipeline
    except ModuleNotFoundError as error:
        if error.name != "apache_beam":
            raise
        raise ConfigError(f"--beam={runner} needs Apache Beam, which is not installed: pip install -e '.[beam]'") from error
    return shard_pipeline.pipeline_of(runner, options)


def _begun(asked, stored, source, parts) -> dict:
    """-> what the shards are made of, which is written down at the first start.

    Raises ConfigError, naming the difference, where they were begun otherwise, or where another split has other classes.
    """
    from mim_jax.data import manifest

    here = {"settings": asked.settings(stored, source), "data": same_data.record(source)}
    here |= {"classes": list(source.class_names), "label_sets": source.label_sets, "missing": source.missing}
    kind = lambda said: (said["classes"], said["label_sets"])
    for other in set(parts.parent.glob(manifest.PARTS.format("*"))) - {parts}:
        said = manifest.read(other / BEGUN) or here
        if said["classes"] and here["classes"] and kind(said) != kind(here):
            both = f"{len(here['classes'])} in {asked.name!r}, {len(said['classes'])} in what {other.name} tells of"
            raise ConfigError(f"--out={asked.out}: its splits would have different classes, {both}: choose another --out.")
    there = manifest.read(parts / BEGUN)
    if there is None:
        for old in (parts.parent / manifest.MANIFEST.format(asked.name), *parts.glob("[0-9]*.json")):  # of an earlier set
            old.unlink(missing_ok=True)
        same_data.keep_list(source, parts)
        manifest.write_text(parts / BEGUN, here)
        return here
    changed = differences(there["settings"], here["settings"])
    changed += same_data.changes(there["data"], tuple(there["classes"]), source, parts)
    if changed:
        raise ConfigError(
            f"--out={asked.out} was begun with other settings or data, and nothing was changed there: {'; '.join(changed)}. "
            f"Choose another --out, or remove {parts} first."
        )
    return there


def _all_shards(asked, stored, source, out, parts, pipeline) -> list[dict] | None:
    """Makes this host's missing shards -> what is known of all; None while those of other hosts are missing."""
    from mim_jax.data import manifest
    from mim_jax.data.shard_workers import Task, written

    count, n = asked.count(source), source.num_examples
    file = lambda k: out / manifest.shard_name(asked.name, k, count)
    told = lambda k: parts / f"{k:05d}.json"
    there = lambda ks: {k: found for k in ks if (found := manifest.known(told(k), file(k))) is not None}
    facts = there(range(count))
    mine = [k for k in range(count) if k % asked.host[1] == asked.host[0] and k not in facts]
    for left in (path for k in mine for path in (told(k), *out.glob(f".{file(k).name}.*"))):  # by a process that was killed
        left.unlink(missing_ok=True)
    tasks = [Task(k, n * k // count, n * (k + 1) // count, file(k), told(k)) for k in mine]
    print(f"{asked.name}: {n} images, {count} shards, {len(facts)} there, {len(tasks)} to be made here", flush=True)
    skipped = [row for shard in facts.values() for row in shard["skipped"]]
    progress = Progress(source, asked.bad_limit, sum(task.high - task.low for task in tasks), skipped)
    if tasks:
        if pipeline is None:
            made = written(asked.opening, source, tasks, stored, asked.workers, progress.tell)
        else:
            made = _by_beam(pipeline, asked.opening, source, tasks, stored, progress.tell)
        facts |= dict(made)
    facts |= there(k for k in range(count) if k not in facts)
    return [facts[k] for k in range(count)] if len(facts) == count else None


def _by_beam(pipeline, opening, source, tasks, stored, tell):
    """Shards as `shard_pipeline.written` gives them, of a source that is opened by workers in folders of their own."""
    from mim_jax.data import shard_pipeline

    whole = lambda path: os.path.abspath(path) if path and "://" not in path else path
    opening = opening | {key: whole(opening[key]) for key in ("path", "data_dir") if key in opening}
    return shard_pipeline.written(pipeline, opening, source, tasks, stored, tell)
