"""torchcap: cascaded projection for trained vision networks, smaller and faster.

    student = torchcap.prepare(model, ratio=0.5)    # trains a projection on every channel space
    small = torchcap.materialize(student)           # plain, smaller layers; nothing of torchcap

The steps by themselves: :func:`analyze` reads a model's channel spaces, a :class:`Plan` gives each
a rank, :func:`prepare` registers the projections, the losses train them, :func:`materialize`
rewrites the model.
"""

from importlib.metadata import version as _version

from torchcap.errors import DataError as DataError
from torchcap.errors import ExampleInputsError as ExampleInputsError
from torchcap.errors import ModelError as ModelError
from torchcap.errors import NothingToCompressError as NothingToCompressError
from torchcap.errors import PlanError as PlanError
from torchcap.errors import StudentError as StudentError
from torchcap.errors import TorchcapError as TorchcapError
from torchcap.errors import TraceError as TraceError
from torchcap.graph.analyze import analyze as analyze
from torchcap.graph.spaces import ChannelSpace as ChannelSpace
from torchcap.graph.spaces import Port as Port
from torchcap.graph.spaces import SpaceGraph as SpaceGraph
from torchcap.pipeline import prepare as prepare
from torchcap.plan.cost import Cost as Cost
from torchcap.plan.cost import cost as cost
from torchcap.plan.plan import Choice as Choice
from torchcap.plan.plan import Plan as Plan
from torchcap.projection.initialize import GreedySelection as GreedySelection
from torchcap.projection.initialize import LargestNorm as LargestNorm
from torchcap.projection.initialize import PrincipalComponents as PrincipalComponents
from torchcap.projection.initialize import RandomOrthonormal as RandomOrthonormal
from torchcap.training.losses import distillation_loss as distillation_loss
from torchcap.training.losses import mixture_loss as mixture_loss
from torchcap.training.losses import reconstruction_loss as reconstruction_loss
from torchcap.transform.materialize import materialize as materialize
from torchcap.transform.student import projection_parameters as projection_parameters

__all__ = [
    "ChannelSpace",
    "Choice",
    "Cost",
    "DataError",
    "ExampleInputsError",
    "GreedySelection",
    "LargestNorm",
    "ModelError",
    "NothingToCompressError",
    "Plan",
    "PlanError",
    "Port",
    "PrincipalComponents",
    "RandomOrthonormal",
    "SpaceGraph",
    "StudentError",
    "TorchcapError",
    "TraceError",
    "__version__",
    "analyze",
    "cost",
    "distillation_loss",
    "materialize",
    "mixture_loss",
    "prepare",
    "projection_parameters",
    "reconstruction_loss",
]

__version__ = _version("torchcap")
