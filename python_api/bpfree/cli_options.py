"""The options of ``bpfree train``, by name: their types, their help, and what they can be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bpfree.data import DATASETS
from bpfree.losses import LOSSES
from bpfree.models import ACTIVATIONS, INITS, MODEL_NAMES
from bpfree.registry import OPTIMIZERS, RULES
from bpfree.rules.gait import FORMS
from bpfree_kernels import UPSAMPLINGS

Rule = Annotated[str, typer.Option(help=f"Learning rule: {', '.join(RULES)}.")]
Model = Annotated[str, typer.Option(help=f"Network: {MODEL_NAMES}.")]
Data = Annotated[str, typer.Option(help=f"Data set: {', '.join(DATASETS)}.")]
DataDir = Annotated[
    Path | None, typer.Option(help="Folder with the data set; before $BPFREE_DATA and cache.")
]
Epochs = Annotated[int, typer.Option(min=1, help="Passes over the training images.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images in a batch.")]
Lr = Annotated[float | None, typer.Option(min=0, help="Learning rate.", show_default="the rule's")]
LrDrops = Annotated[
    str | None,
    typer.Option(help="Learning rate ×0.1 after these epochs, e.g. 60,90.", show_default="never"),
]
Optimizer = Annotated[str, typer.Option(help=f"{', '.join(OPTIMIZERS)}.")]
Momentum = Annotated[float | None, typer.Option(help="Momentum of sgd.", min=0)]
WeightDecay = Annotated[
    float | None, typer.Option(min=0, help="Weight decay.", show_default="torch's")
]
Loss = Annotated[
    str | None, typer.Option(help=f"Output layer: {', '.join(LOSSES)}.", show_default="the rule's")
]
Activation = Annotated[
    str | None,
    typer.Option(help=f"Hidden activation: {', '.join(ACTIVATIONS)}.", show_default="the model's"),
]
Dropout = Annotated[
    float | None,
    typer.Option(
        help="Share of the inputs of every fully connected layer to drop.",
        show_default="the model's",
    ),
]
InputDropout = Annotated[bool, typer.Option(help="Whether fc nets also drop pixels.")]
Bias = Annotated[
    bool | None,
    typer.Option("--bias/--no-bias", help="Layers with biases.", show_default="the model's"),
]
Init = Annotated[
    str | None,
    typer.Option(
        help=f"Initial weights: {', '.join(INITS)} (uniform).", show_default="the model's"
    ),
]
Untied = Annotated[
    bool, typer.Option("--untied", help="Locally connected layers instead of convolutions.")
]
Connectivity = Annotated[
    float | None,
    typer.Option(help="Share of the connections that exist (urfb, frfb).", show_default="1"),
]
Beta = Annotated[
    float | None, typer.Option(help="How far an error moves a target (ekdaa).", show_default="0.9")
]
Gamma = Annotated[
    float | None,
    typer.Option(help="Factor of the error kernels' gradient (ekdaa).", show_default="0.1"),
]
Upsample = Annotated[
    str | None,
    typer.Option(
        help=f"How an error passes a max pooling (ekdaa): {', '.join(UPSAMPLINGS)}.",
        show_default="argmax",
    ),
]
MaxNorm = Annotated[
    float | None,
    typer.Option(help="Length to which each gradient is cut (ekdaa).", show_default="any length"),
]
OrthogonalPenalty = Annotated[
    float | None,
    typer.Option(
        help="Factor of the regulariser that keeps weights orthogonal (gait).", show_default="0"
    ),
]
OffDiagonal = Annotated[
    bool | None,
    typer.Option("--off-diagonal", help="Regulariser leaves the rows' lengths alone (gait)."),
]
Form = Annotated[
    str | None,
    typer.Option(
        help=f"How errors are computed (gait): {', '.join(FORMS)}.", show_default=FORMS[0]
    ),
]
Normalised = Annotated[
    bool | None,
    typer.Option(
        "--normalised/--vanilla",
        help="Whether the literal form scales each sample's target (gait).",
        show_default="normalised",
    ),
]
Dtype = Annotated[
    str, typer.Option(help="float32, or float64, which the literal form of gait needs.")
]
Standardize = Annotated[
    bool | None,
    typer.Option(help="Channels to mean 0, deviation 1.", show_default="for cifar-10 only"),
]
Diagnostics = Annotated[
    bool,
    typer.Option(
        "--diagnostics",
        help="Record each layer's angle to backprop's update, and (pepita) between feedback and weights; "
        "draw them and the weights.",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of weights, feedback and order.")]
Device = Annotated[
    str | None, typer.Option(help="cpu or cuda.", show_default="cuda if there is one")
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads on the CPU.", show_default="torch's")
]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder for the results.", show_default="runs/RULE-MODEL-DATA-seedSEED"),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")]
