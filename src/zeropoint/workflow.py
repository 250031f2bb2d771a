"""The PT2E workflow: prepare, (calibrate), convert. One line per stage."""

from __future__ import annotations

from typing import Literal

from torch.fx import GraphModule

from zeropoint.annotate import stock
from zeropoint.annotate.groups import resolve
from zeropoint.annotate.plan import Plan
from zeropoint.annotate.quantizer import Quantizer
from zeropoint.annotate.read import read_plan
from zeropoint.core.arguments import require_bool
from zeropoint.core.errors import SpecError
from zeropoint.graph.capture import require_exported
from zeropoint.graph.explained import ExplainedModule
from zeropoint.graph.graph_pass import control_flow_as_operators, control_flow_in_python, pipeline
from zeropoint.graph.invariants import check_invariants
from zeropoint.numerics.fake_quantize import FixedQParamsFakeQuantize
from zeropoint.numerics.scratch import LateWrites
from zeropoint.passes.annotate import annotate
from zeropoint.passes.body_parameters import bring_in_parameters, lift_parameters
from zeropoint.passes.canonicalize import canonicalize
from zeropoint.passes.convert import convert, every, none, nothing
from zeropoint.passes.end_training import end_training
from zeropoint.passes.finish import finish
from zeropoint.passes.fold_batch_norm import fold_batch_norm
from zeropoint.passes.form_in_use import mark_biases
from zeropoint.passes.halve_tables import halve_tables
from zeropoint.passes.insert_observers import insert_observers
from zeropoint.passes.integer_state import integer_state
from zeropoint.passes.invariants import CONVERTED
from zeropoint.passes.make_observers import make_observers
from zeropoint.passes.qat_batch_norm import qat_batch_norm
from zeropoint.passes.reference.rewrite import in_integers
from zeropoint.passes.round_biases import BiasRounding, round_biases
from zeropoint.passes.spell_batch_norm import spell_batch_norm
from zeropoint.passes.trained_module import TrainedModule
from zeropoint.passes.weight_scales import steady_weight_scales
from zeropoint.report.coverage import coverage
from zeropoint.report.record import finish_record, record_of, require_prepared, require_unprepared, start_record
from zeropoint.report.torchao_mark import leave_mark, take_mark

StockObservers = Literal["replace", "keep"]


def prepare_pt2e(
    model: GraphModule, quantizer: Quantizer, *, stock_observers: StockObservers = "replace"
) -> GraphModule:
    """Returns the model with observers where the quantizer wants them, ready for calibration.

    Where a call of it fails, the error names the input that the model was not exported for.

    Args:
        model: an exported graph module: ``torch.export.export(m, example_inputs).module()``. Its graph is changed and
            shared with the result.
        quantizer: any object with ``transform_for_annotation``, ``annotate``, ``validate`` and
            ``prepare_obs_or_fq_callback``.
        stock_observers: what becomes of observers and fake quantizers that torch or torchao ship: ours of the same
            settings and scales, which are faster and say where data is missing, or "keep". Those of others run as
            they are.

    Raises:
        CaptureError: the model is not exported.
        GraphError: the model is prepared or converted already.
        AnnotationError, RuleError: the quantizer's annotations contradict the graph or one another.
        SpecError: an observer refuses its spec, or its tensor.
    """
    prepared, _ = prepare_with_plan(model, quantizer, stock_observers)
    return prepared


@pipeline
def prepare_qat_pt2e(
    model: GraphModule, quantizer: Quantizer, *, stock_observers: StockObservers = "replace"
) -> GraphModule:
    """Returns the model with fake quantizers where the quantizer wants them, ready for training.

    A convolution or linear layer with a batch norm after it is trained with the weight that it will have once the two
    are one; ``convert_pt2e`` makes them one. Train the result as any module, on data of the shapes it was exported for.

    Args:
        model: an exported graph module, in train mode: ``torch.export.export(m.train(), example_inputs).module()``. Of
            one in eval mode, batch norms that are folded train all the same. Its graph is changed and shared with the
            result.
        quantizer: as in ``prepare_pt2e``; its specs name fake quantizers, as ``is_qat=True`` gives them.
        stock_observers: as in ``prepare_pt2e``.

    Raises:
        CaptureError, GraphError, AnnotationError, RuleError, SpecError: as in ``prepare_pt2e``.
    """
    require_exported(model)
    require_unprepared(model, "prepare_qat_pt2e")
    constructors = stock.stock_observers(stock_observers)
    bring_in_parameters(model)
    canonicalize(model)
    spell_batch_norm(model)
    model = annotate(model, quantizer)
    plan = read_plan(model, constructors)
    rows = coverage(model, plan)
    qat_batch_norm(model, plan)
    plan = read_plan(model, constructors)
    observers = make_observers(model, plan, resolve(plan), quantizer, FixedQParamsFakeQuantize)
    start_record(model, rows, quantizer, is_qat=True)
    insert_observers(model, observers, look_again=record_of(model).policy is None)
    control_flow_in_python(model)
    if record_of(model).rounds_biases:
        mark_biases(model)
    leave_mark(model)
    return finish(model, TrainedModule)


@pipeline
def prepare_with_plan(
    model: GraphModule, quantizer: Quantizer, stock_observers: StockObservers = "replace"
) -> tuple[GraphModule, Plan]:
    """Returns what ``prepare_pt2e`` returns, and the plan that it carried out."""
    require_exported(model)
    require_unprepared(model, "prepare_pt2e")
    constructors = stock.stock_observers(stock_observers)
    bring_in_parameters(model)
    canonicalize(model)
    fold_batch_norm(model)
    model = annotate(model, quantizer)
    plan = read_plan(model, constructors)
    observers = make_observers(model, plan, resolve(plan), quantizer)
    start_record(model, coverage(model, plan), quantizer)
    insert_observers(model, observers, look_again=record_of(model).policy is None)
    leave_mark(model)
    return finish(model, ExplainedModule), plan


@pipeline
def convert_pt2e(
    model: GraphModule,
    use_reference_representation: bool = False,
    fold_quantize: bool = True,
    fold_quantize_into_mutable_buffers: bool = False,
) -> GraphModule:
    """Returns the model with quantize and dequantize operators in place of observers, and integer weights.

    Args:
        model: what ``prepare_pt2e`` returned, calibrated, or ``prepare_qat_pt2e``, trained; in train or in eval mode.
            Its graph is changed and shared with the result, which is in eval mode.
        use_reference_representation: integer arithmetic in place of dequantize, operator, quantize. To see and to check
            what is computed; backends read the other form.
        fold_quantize: store quantized constants as integers; else they stay float with a quantize operator after them.
        fold_quantize_into_mutable_buffers: store as integers, too, the buffers that the model reads quantized and
            writes by one ``copy_`` of a quantized tensor, in its scale; warns of others. Needs ``fold_quantize``.

    Raises:
        CalibrationError: an observer saw no data; names the tensor.
        GraphError: the model was not prepared, or is converted already, or torchao prepared it for training, with batch
            norm. One of which nothing was annotated stays float, with a warning.
        SpecError: a flag is no bool, the last comes without ``fold_quantize``, or a buffer of it has two names.
    """
    _check_flags(use_reference_representation, fold_quantize, fold_quantize_into_mutable_buffers)
    require_exported(model)
    require_prepared(model, "convert_pt2e")
    on_grid, is_qat = record_of(model).rounds_biases, take_mark(model) or record_of(model).is_qat
    if is_qat:
        control_flow_as_operators(model)
        end_training(model)
    known = steady_weight_scales if on_grid and not is_qat else nothing  # Trained weights are on a grid already.
    with LateWrites() as writes:
        convert(model, every if fold_quantize else none, writes, known)
        biases = _in_stored_form(model, on_grid, fold_quantize_into_mutable_buffers)
        converted = finish(model)
    if use_reference_representation:
        converted = in_integers(converted)
    finish_record(converted, tuple(biases), "reference" if use_reference_representation else "q/dq")
    check_invariants(converted, CONVERTED, "convert_pt2e")
    return converted


def _in_stored_form(model: GraphModule, biases_on_grid: bool, state_as_integers: bool) -> list[BiasRounding]:
    """Brings what a converted graph holds to the form that is stored; returns what became of biases."""
    if state_as_integers:
        integer_state(model)
    biases = round_biases(model) if biases_on_grid else []
    if record_of(model).halves_tables:
        halve_tables(model)
    lift_parameters(model)
    return biases


def _check_flags(
    use_reference_representation: bool, fold_quantize: bool, fold_quantize_into_mutable_buffers: bool
) -> None:
    require_bool("use_reference_representation", use_reference_representation, "convert_pt2e")
    require_bool("fold_quantize", fold_quantize, "convert_pt2e")
    require_bool("fold_quantize_into_mutable_buffers", fold_quantize_into_mutable_buffers, "convert_pt2e")
    if fold_quantize_into_mutable_buffers and not fold_quantize:
        what = "fold_quantize_into_mutable_buffers=True requires fold_quantize=True"
        raise SpecError(what, where="convert_pt2e", remedy="Leave fold_quantize out.")
