"""torchcap: cascaded projection for trained vision networks, smaller and faster.

    student = torchcap.prepare(model, ratio=0.5)    # trains a projection on every channel space
    small = torchcap.materialize(student)           # plain, smaller layers; nothing of torchcap

The steps by themselves: :func:`analyze` reads a model's channel spaces, a :class:`Plan` gives each
a rank, :func:`prepare` registers the projections, the losses train them, :func:`materialize`
rewrites the model.
"""

from importlib.metadata import version as _version

from torchcap.budget import plan_for as plan_for
from torchcap.checkpoint.contents import Contents as Contents
from torchcap.checkpoint.load import describe as describe
from torchcap.checkpoint.load import load as load
from torchcap.checkpoint.save import save as save
from torchcap.errors import DataError as DataError
from torchcap.errors import ExampleInputsError as ExampleInputsError
from torchcap.errors import FileError as FileError
from torchcap.errors import MissingPackageError as MissingPackageError
from torchcap.errors import ModelError as ModelError
from torchcap.errors import NothingToCompressError as NothingToCompressError
from torchcap.errors import PlanError as PlanError
from torchcap.errors import RecipeError as RecipeError
from torchcap.errors import StateError as StateError
from torchcap.errors import StudentError as StudentError
from torchcap.errors import TorchcapError as TorchcapError
from torchcap.errors import TraceError as TraceError
from torchcap.errors import TrainingError as TrainingError
from torchcap.graph.analyze import analyze as analyze
from torchcap.graph.spaces import ChannelSpace as ChannelSpace
from torchcap.graph.spaces import Port as Port
from torchcap.graph.spaces import SpaceGraph as SpaceGraph
from torchcap.graph.values import Call as Call
from torchcap.graph.values import Channels as Channels
from torchcap.graph.values import Extent as Extent
from torchcap.graph.values import Heads as Heads
from torchcap.graph.values import Opaque as Opaque
from torchcap.graph.values import Operator as Operator
from torchcap.graph.values import Setting as Setting
from torchcap.pipeline import compress as compress
from torchcap.pipeline import prepare as prepare
from torchcap.plan.allocate import allocate as allocate
from torchcap.plan.cost import Cost as Cost
from torchcap.plan.cost import LayerCost as LayerCost
from torchcap.plan.cost import cost as cost
from torchcap.plan.cost import layer_costs as layer_costs
from torchcap.plan.latency import LatencyTable as LatencyTable
from torchcap.plan.latency import LayerTimes as LayerTimes
from torchcap.plan.latency import predict_latency as predict_latency
from torchcap.plan.plan import Choice as Choice
from torchcap.plan.plan import Plan as Plan
from torchcap.plan.sensitivity import Curve as Curve
from torchcap.plan.sensitivity import Sensitivity as Sensitivity
from torchcap.plot import plot_plan as plot_plan
from torchcap.plot import plot_sensitivity as plot_sensitivity
from torchcap.plot import plot_tradeoff as plot_tradeoff
from torchcap.projection.initialize import GreedySelection as GreedySelection
from torchcap.projection.initialize import LargestNorm as LargestNorm
from torchcap.projection.initialize import PrincipalComponents as PrincipalComponents
from torchcap.projection.initialize import RandomOrthonormal as RandomOrthonormal
from torchcap.report import Report as Report
from torchcap.report import compare as compare
from torchcap.training.clock import measure_latency as measure_latency
from torchcap.training.losses import distillation_loss as distillation_loss
from torchcap.training.losses import mixture_loss as mixture_loss
from torchcap.training.losses import reconstruction_loss as reconstruction_loss
from torchcap.training.measure import sensitivity as sensitivity
from torchcap.training.progress import Progress as Progress
from torchcap.training.projections import train_projections as train_projections
from torchcap.training.recipe import SGD as SGD
from torchcap.training.recipe import Adam as Adam
from torchcap.training.recipe import ClosedForm as ClosedForm
from torchcap.training.recipe import FlipAndShift as FlipAndShift
from torchcap.training.recipe import Mix as Mix
from torchcap.training.recipe import Projections as Projections
from torchcap.training.recipe import Recipe as Recipe
from torchcap.training.recipe import Relaxation as Relaxation
from torchcap.training.recipe import Training as Training
from torchcap.training.relax import fine_tune as fine_tune
from torchcap.training.relax import relax as relax
from torchcap.training.rounds import Round as Round
from torchcap.training.rounds import all_at_once as all_at_once
from torchcap.training.rounds import layer_by_layer as layer_by_layer
from torchcap.training.rounds import odd_then_even as odd_then_even
from torchcap.training.solve import Solution as Solution
from torchcap.training.solve import Solved as Solved
from torchcap.training.solve import solve as solve
from torchcap.transform.materialize import materialize as materialize
from torchcap.transform.split import split_attention as split_attention
from torchcap.transform.student import projection_parameters as projection_parameters

__all__ = [
    "SGD",
    "Adam",
    "Call",
    "ChannelSpace",
    "Channels",
    "Choice",
    "ClosedForm",
    "Contents",
    "Cost",
    "Curve",
    "DataError",
    "ExampleInputsError",
    "Extent",
    "FileError",
    "FlipAndShift",
    "GreedySelection",
    "Heads",
    "LargestNorm",
    "LatencyTable",
    "LayerCost",
    "LayerTimes",
    "MissingPackageError",
    "Mix",
    "ModelError",
    "NothingToCompressError",
    "Opaque",
    "Operator",
    "Plan",
    "PlanError",
    "Port",
    "PrincipalComponents",
    "Progress",
    "Projections",
    "RandomOrthonormal",
    "Recipe",
    "RecipeError",
    "Relaxation",
    "Report",
    "Round",
    "Sensitivity",
    "Setting",
    "Solution",
    "Solved",
    "SpaceGraph",
    "StateError",
    "StudentError",
    "TorchcapError",
    "TraceError",
    "Training",
    "TrainingError",
    "__version__",
    "all_at_once",
    "allocate",
    "analyze",
    "compare",
    "compress",
    "cost",
    "describe",
    "distillation_loss",
    "fine_tune",
    "layer_by_layer",
    "layer_costs",
    "load",
    "materialize",
    "measure_latency",
    "mixture_loss",
    "odd_then_even",
    "plan_for",
    "plot_plan",
    "plot_sensitivity",
    "plot_tradeoff",
    "predict_latency",
    "prepare",
    "projection_parameters",
    "reconstruction_loss",
    "relax",
    "save",
    "sensitivity",
    "solve",
    "split_attention",
    "train_projections",
]

__version__ = _version("torchcap")
