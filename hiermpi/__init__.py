"""hiermpi trains language models data-parallel on CPU clusters, through MPI.

The names below are the Python API. Each is imported when it is first used: ``import hiermpi`` loads neither
numpy nor MPI, and only :func:`train` and :func:`evaluate` with a communicator need MPI at all.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hiermpi.communication.reduction import Reduction as Reduction
    from hiermpi.config.schema import Config as Config
    from hiermpi.data.documents import Document as Document
    from hiermpi.errors import PluginError as PluginError
    from hiermpi.errors import UserError as UserError
    from hiermpi.model.contract import Batch as Batch
    from hiermpi.model.contract import Family as Family
    from hiermpi.model.contract import Model as Model
    from hiermpi.model.parameters import ParameterBuffer as ParameterBuffer
    from hiermpi.model.parameters import TensorSpec as TensorSpec
    from hiermpi.optimizer.rules import Hyper as Hyper
    from hiermpi.optimizer.rules import Rule as Rule
    from hiermpi.optimizer.rules import Values as Values
    from hiermpi.preparation.preparing import prepare as prepare
    from hiermpi.training.evaluation import evaluate as evaluate
    from hiermpi.training.opening import generate as generate
    from hiermpi.training.session import TrainResult as TrainResult
    from hiermpi.training.session import train as train

__version__ = "0.1.0"

PLACES = {
    "Batch": "hiermpi.model.contract:Batch",
    "Config": "hiermpi.config.schema:Config",
    "Document": "hiermpi.data.documents:Document",
    "Family": "hiermpi.model.contract:Family",
    "Hyper": "hiermpi.optimizer.rules:Hyper",
    "Model": "hiermpi.model.contract:Model",
    "ParameterBuffer": "hiermpi.model.parameters:ParameterBuffer",
    "PluginError": "hiermpi.errors:PluginError",
    "Reduction": "hiermpi.communication.reduction:Reduction",
    "Rule": "hiermpi.optimizer.rules:Rule",
    "TensorSpec": "hiermpi.model.parameters:TensorSpec",
    "TrainResult": "hiermpi.training.session:TrainResult",
    "UserError": "hiermpi.errors:UserError",
    "Values": "hiermpi.optimizer.rules:Values",
    "evaluate": "hiermpi.training.evaluation:evaluate",
    "generate": "hiermpi.training.opening:generate",
    "prepare": "hiermpi.preparation.preparing:prepare",
    "train": "hiermpi.training.session:train",
}
"""The module and attribute that define each name of the API."""

__all__ = [
    "Batch",
    "Config",
    "Document",
    "Family",
    "Hyper",
    "Model",
    "ParameterBuffer",
    "PluginError",
    "Reduction",
    "Rule",
    "TensorSpec",
    "TrainResult",
    "UserError",
    "Values",
    "__version__",
    "evaluate",
    "generate",
    "prepare",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module 'hiermpi' has no attribute {name!r}")
    import importlib

    module, _, attribute = PLACES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *PLACES])
