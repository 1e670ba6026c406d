"""`job=pretrain`: a method of METHODS on images, labelled or not."""

from etils import epath

from mim_jax.assemble import datasets, inheritance, methods, weights
from mim_jax.assemble.inputs import pretraining_inputs
from mim_jax.config import ConfigDict, ConfigError
from mim_jax.jobs import training
from mim_jax.objectives.objective import Objective
from mim_jax.runs import saved
from mim_jax.sections import defaults, kept, nested, one_of, read
from mim_jax.train.experiment import Start
from mim_jax.train.optimizer import OPTIMIZERS, AdamW, Lars


class Pretrain(training.Training):
    """`settings` stands in a section called like the method."""

    method: str
    settings: ConfigDict = kept(methods.method_class, by="method")
    tokenizer: methods.Dalle | methods.OwnTokenizer | None = one_of("kind", methods.TOKENIZERS, optional=True)
    data: datasets.PretrainingData = nested(datasets.PretrainingData)
    optim: AdamW | Lars = one_of("name", OPTIMIZERS)


def run(settings: ConfigDict, workdir: epath.Path) -> dict:
    """-> the last numbers of the run."""
    config = read(Pretrain, settings)
    mesh, source, made = training.devices(config), config.opened(config.data.train_split), methods.objective(config)
    inputs = pretraining_inputs(made, config.normaliser(), config.channels, config.data.jitter)
    begin = Start() if saved.has_checkpoint(workdir) else start(config, made, mesh)
    e = training.experiment(config, settings, objective=made, inputs=inputs, source=source, start=begin, mesh=mesh)
    return training.run(e, workdir, settings.to_dict(), defaults(Pretrain, settings))


def start(config: Pretrain, made: Objective, mesh) -> Start:
    """Weights of the run at `init_from`, of the same method, and of the tokenizer. Raises ConfigError (CheckpointError)."""
    replace, words, ancestor = {}, "from scratch", {}
    if config.init_from:
        run = saved.open(config.init_from)
        there = run.config
        if (there.job, there.get("method")) != (config.job, config.method):
            what = there.method if there.job == config.job else f"job={there.job}"
            raise ConfigError(
                f"{run.folder} is a run of {what}; pretraining with method={config.method} goes on from one of its own"
            )
        replace, words = weights.taken_over(run, made, config.encoder, mesh)
        ancestor = run.ancestry()
    t = config.tokenizer
    if t and t.kind != "untrained" and (t.weights or not any(path.startswith("tokenizer/") for path in replace)):
        found, said = weights.tokenizer_weights(config, made, mesh)
        replace, words = replace | found, f"{words}; {said}"
    return Start(replace, words, ancestor)


def reopened(run: saved.Saved, what: str, place=("", "", "")) -> tuple[Pretrain, Objective]:
    """The settings and the objective of a pretraining run; `place`: source, path and data_dir of other images than its own.

    Raises ConfigError for a run of another job, of which there is no `what`.
    """
    if run.config.job != "pretrain":
        raise ConfigError(f"'{run.folder}' is of a {run.config.job} run; {what} a pretraining run")
    settings = saved_keys(inheritance.with_other_data(run.config, *place))
    settings.encoder.update(inheritance.anywhere(settings.encoder))
    config = read(Pretrain, settings, complete=True)
    return config, methods.objective(config, complete=True)


def saved_keys(config: ConfigDict) -> ConfigDict:
    """A saved config without what checkpoints keep beside it."""
    return ConfigDict({key: value for key, value in config.to_dict().items() if key not in ("classes", "class_names")})
