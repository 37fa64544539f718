"""The decoder: embeddings, layer groups, final norm and head, as programs for an executor.

Dimensions: `T` rows of a pass, `R` rows that get logits, `E` hidden size, `V` vocabulary, `N` tokens that are named.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from easyspec.errors import ConfigurationError
from easyspec.model.config import ModelConfig
from easyspec.model.draft_vocabulary import DraftVocabulary
from easyspec.model.layer_spec import NormKind
from easyspec.model.layer_weights import Layer, load_layer, load_norm
from easyspec.model.layers import GroupWriter
from easyspec.model.pass_orders import HeadOrder, Order, PassOrder, decode_order, encode_order
from easyspec.model.rope import rotary_tables
from easyspec.model.row_layout import RowLayout, Segment, lay_out
from easyspec.model.weight_reader import WeightFormat, WeightReader
from easyspec.model.weights import Checkpoint, TensorSource
from easyspec.ops.executor import Executor, Program
from easyspec.ops.kv_pool import KVPool
from easyspec.ops.packed import PackedWeight
from easyspec.ops.program import Buffer, Embed, Norm, Product, ProgramWriter, Scale, Select
from easyspec.ops.workspace import Workspace
from easyspec.parallel.layer_groups import LayerPlan, sequential_plan
from easyspec.parallel.rank_placement import RankPlacement
from easyspec.parallel.ranks import SINGLE_RANK, Ranks
from easyspec.parallel.shard import WHOLE, Shard, check_splits
from easyspec.speculation.parameters import MlpPlacement
from easyspec.speculation.split_choice import NO_ROWS, SplitRows, choose_split

# Programs that are kept ready: clients choose plans, and each has buffers of its own for rounded inputs.
_MAX_PROGRAMS = 64
# Of the native executor: positions whose attention sums are formed together, and rows whose spans threads share.
_SPAN_POSITIONS, _SPLIT_ROWS = 256, 64


@dataclass(frozen=True)
class PassResult:
    """What a pass came to.

    named_logits: float32 [R, N] of the rows that were asked for, on rank 0; overwritten by the next pass. Its columns
    are the tokens of `vocabulary`, or all of them. choices: the tokens at the choice rows, int64. hidden: [T, E] before
    the final norm, if it was to be kept, else None.
    """

    named_logits: torch.Tensor
    vocabulary: DraftVocabulary | None
    choices: torch.Tensor
    hidden: torch.Tensor | None

    @property
    def logits(self) -> torch.Tensor:
        """[R, V], with -inf where the model names no token."""
        return self.named_logits if self.vocabulary is None else self.vocabulary.spread(self.named_logits)


@dataclass(frozen=True)
class _CompiledPass:
    """A program, the hidden state that it begins and ends with, and its logits if it has a head."""

    program: Program
    hidden: Buffer
    logits: Buffer | None
    buffers: Sequence[Buffer]


class Decoder:
    """A model over a KV pool, executed by a layer plan.

    A row's bits depend on its own tokens alone (easyspec/ops/program.py). Not thread-safe: one thread owns the device.

    Of several ranks, rank 0 is called and leads; the others `follow` and compute their part of its passes, as
    `placement` says. `layer_config` is what this rank's layers and KV pool see of the model.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        executor: Executor,
        *,
        ranks: Ranks = SINGLE_RANK,
        placement: RankPlacement = RankPlacement.TENSOR,
        weights: WeightFormat = WeightFormat.AUTO,
        open_tensors: Callable[[Path], TensorSource] = Checkpoint,
    ) -> None:
        """Raises ConfigurationError for a missing or corrupt checkpoint, or one that does not split evenly."""
        own = Shard(ranks.rank, ranks.size)
        self._tensor_shard = own if placement is RankPlacement.TENSOR else WHOLE
        self._layer_shard = WHOLE if placement is RankPlacement.TENSOR else own
        self._tensor_shard.check(config)
        if ranks.size > 1:
            check_splits(config, placement)
        mlp_shard = None
        if placement is RankPlacement.LAYERS_SHARDED_MLP and ranks.size > 1:
            own.check_mlp(config)
            mlp_shard = own
        self.config = config
        self.layer_config = self._tensor_shard.of(config)
        self.executor = executor
        self.sequential_plan = sequential_plan(config.num_layers)
        self._ranks = ranks
        self._rotaries = rotary_tables(config, executor.device)
        self._vocabulary = DraftVocabulary.of(config, executor.device)
        if self._vocabulary is not None and self._tensor_shard.size > 1:
            raise ConfigurationError(f"{folder} has a draft_vocabulary: its head cannot be split over ranks")
        with open_tensors(folder) as checkpoint:
            reader = WeightReader(checkpoint, executor, config.dtype, weights)
            shape, token_ids = (config.vocab_size, config.hidden_size), self._tensor_shard.vocabulary(config.vocab_size)
            self._final_norm = load_norm(reader, "model.norm", config.spec.final_norm, config.hidden_size)
            is_tied = config.tie_word_embeddings
            name = "model.embed_tokens.weight" if is_tied else "lm_head.weight"
            table = reader.head("model.embed_tokens.weight", shape)
            self._embeddings: PackedWeight = reader.pack(table)
            if self._vocabulary is not None:
                table = table if is_tied else reader.head(name, shape)
                self._head = reader.pack(table.outputs(self._vocabulary.token_ids))
            elif is_tied and len(token_ids) == config.vocab_size:
                self._head = self._embeddings
            else:
                self._head = reader.pack(reader.head(name, shape, token_ids))
            self._layers: list[Layer] = [
                load_layer(reader, config, index, self._tensor_shard, mlp_shard) for index in range(config.num_layers)
            ]
        self._passes: OrderedDict[tuple[LayerPlan, range, bool], _CompiledPass] = OrderedDict()
        head = ProgramWriter()
        hidden = head.buffer(config.hidden_size, is_selected=True)
        logits = self._write_head(head, hidden)
        self._head_program = _CompiledPass(executor.compile(head), hidden, logits, head.buffers)

    @property
    def device(self) -> torch.device:
        return self.executor.device

    @property
    def num_parameters(self) -> int:
        """Weights of all ranks' matrices, tied embeddings counted once."""
        in_layers = sum(w.num_outputs * w.num_inputs for layer in self._layers for w in layer.weights)
        num_ends = self.config.vocab_size * self.config.hidden_size * (1 if self.config.tie_word_embeddings else 2)
        return self._tensor_shard.size * in_layers + num_ends

    @property
    def num_weight_bytes(self) -> int:
        """Memory of this rank's packed matrices."""
        ends = {id(end): end.num_bytes for end in (self._embeddings, self._head)}
        return sum(w.num_bytes for layer in self._layers for w in layer.weights) + sum(ends.values())

    @property
    def weight_format(self) -> str:
        """What most of the layers' weights are kept in."""
        counts: Counter[str] = Counter()
        for layer in self._layers:
            for weight in layer.weights:
                counts[weight.format_name] += weight.num_outputs * weight.num_inputs
        return counts.most_common(1)[0][0]

    def new_pool(self, num_slots: int) -> KVPool:
        """Memory for keys and values of so many tokens, as this rank's layers want it."""
        c = self.layer_config
        return KVPool(c.num_layers, c.num_kv_heads, c.head_dim, num_slots, c.dtype, self.device)

    def step_bytes(self, num_rows: int, context: int) -> int:
        """Memory that a pass of so many rows, all with logits, behind texts of `context` tokens takes at most, beside
        weights and KV."""
        buffers = self._compiled(self.sequential_plan, range(self.config.num_layers), has_head=True).buffers
        c = self.layer_config
        floats = Workspace.most_floats(buffers, num_rows, num_rows)
        if self.executor.name == "reference":
            # A product on its way into its buffer; the slots that rows see; a row's keys and values.
            floats += 2 * num_rows * max(buffer.width for buffer in buffers)
            floats += 2 * num_rows * context + 2 * context * c.num_kv_heads * c.head_dim
        else:
            # Inputs of products, rounded; sums over spans of positions for as few rows as are split that way.
            floats += num_rows * sum(buffer.width for buffer in buffers if not buffer.is_selected)
            floats += _SPLIT_ROWS * (context // _SPAN_POSITIONS + 1) * c.num_heads * (c.head_dim + 2)
        return 4 * floats

    def forward(
        self,
        layout: RowLayout,
        pool: KVPool,
        plan: LayerPlan | None = None,
        logit_rows: Sequence[int] = (),
        choice_rows: SplitRows = NO_ROWS,
        *,
        keeps_hidden: bool = False,
    ) -> PassResult:
        """Run a pass over all layers; writes K and V of every row.

        Where the vocabulary is split over ranks, tokens are chosen at `choice_rows` without gathering their logits.
        """
        plan = plan or self.sequential_plan
        # Before anything of this pass is computed: the other ranks must enter the same collectives in the same order.
        self._lead(PassOrder(layout.segments, plan, tuple(logit_rows), choice_rows, keeps_hidden))
        rows = layout.select([*logit_rows, *choice_rows.rows])
        compiled = self._compiled(plan, range(self.config.num_layers), has_head=len(rows.selected) > 0)
        wanted = [] if compiled.logits is None else [compiled.logits]
        outputs = [*wanted, compiled.hidden] if keeps_hidden else wanted
        results = compiled.program.run(rows, pool, outputs=outputs)
        share = results[0] if wanted else torch.empty(0, self._head.num_outputs, device=self.device)
        num_logits = len(logit_rows)
        logits = self._gathered(share[:num_logits]) if num_logits else share[:0]
        choices = _NO_CHOICES
        if choice_rows.rows:
            own = self._tensor_shard.vocabulary(self.config.vocab_size)
            choices = choose_split(share[num_logits:, : len(own)], own.start, choice_rows, self._ranks.gather)
        # A copy: results are views of the workspace, which the next pass overwrites.
        return PassResult(logits, self._vocabulary, choices, results[-1].clone() if keeps_hidden else None)

    def _gathered(self, share: torch.Tensor) -> torch.Tensor:
        if self._tensor_shard.size == 1:
            return share
        missing = self._tensor_shard.vocabulary_share(self.config.vocab_size) - share.shape[1]
        share = torch.nn.functional.pad(share, (0, missing))  # a short last share
        return self._ranks.gather(share).transpose(0, 1).flatten(1)[:, : self.config.vocab_size]

    @property
    def can_slice(self) -> bool:
        """Whether passes can be run in parts: several ranks compute whole passes, in the order they are told."""
        return self._ranks.size == 1

    def forward_between(
        self, layout: RowLayout, pool: KVPool, plan: LayerPlan, layers: range, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Part of a pass: `layers` alone, which begin and end at group borders of `plan`; writes their K and V.

        `hidden` [T, E] is what the rows have come to at the entrance, None where it is the first layer. Returns what
        they come to at the exit, without the final norm. On one rank only (`can_slice`).
        """
        assert self.can_slice, "one rank"
        compiled = self._compiled(plan, layers, has_head=False)
        inputs = {} if hidden is None else {compiled.hidden: hidden}
        (result,) = compiled.program.run(layout.rows, pool, inputs, [compiled.hidden])
        return result.clone()

    def forward_in_slices(self, layout: RowLayout, pool: KVPool) -> Iterator[bool]:
        """The same pass layer by layer, for its K and V alone: each step computes one and says whether it was the last.

        Other passes may run in between, as long as they leave the slots of its rows alone.
        """
        hidden: torch.Tensor | None = None
        for layer in range(self.config.num_layers):
            hidden = self.forward_between(layout, pool, self.sequential_plan, range(layer, layer + 1), hidden)
            if self.device.type == "cuda":  # so that the caller's clock sees what the layer took
                torch.cuda.synchronize(self.device)
            yield layer + 1 == self.config.num_layers

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final norm and head on hidden states [R, E] of any depth: float32 [R, V], overwritten by the next pass.

        Of several ranks, rank 0 alone may ask for rows of the last pass that kept its hidden state: `more_logits`.
        """
        # The states are there already: a pass of no tokens that selects rows of them.
        layout = lay_out([Segment((), (), (), (), np.zeros(0, dtype=np.int64))])
        rows = layout.select(range(len(hidden)))
        buffer = self._head_program.logits
        assert buffer is not None, "the head has logits"
        (share,) = self._head_program.program.run(rows, _NO_POOL, {self._head_program.hidden: hidden}, [buffer])
        return self._gathered(share) if self._vocabulary is None else self._vocabulary.spread(share)

    def more_logits(self, result: PassResult, rows: Sequence[int]) -> torch.Tensor:
        """Logits of further rows of the last pass, which kept its hidden state: float32 [R, V]."""
        assert result.hidden is not None, "the pass was told to keep it"
        if self._tensor_shard.size > 1:
            self._lead(HeadOrder(tuple(rows)))
        return self.logits(result.hidden[list(rows)])

    @property
    def is_vocabulary_split(self) -> bool:
        """Whether ranks have a share of the head each, so that choosing a token moves less than its logits."""
        return self._tensor_shard.size > 1

    def follow(self, pool: KVPool) -> None:
        """Compute this rank's part of the passes that rank 0 runs, until it leaves; raises EngineLostError."""
        kept = torch.empty(0)
        while (order := decode_order(self._ranks.share(None))) is not Order.LEAVE:
            if isinstance(order, PassOrder):
                result = self.forward(
                    lay_out(order.segments),
                    pool,
                    order.plan,
                    order.logit_rows,
                    order.choice_rows,
                    keeps_hidden=order.keeps_hidden,
                )
                kept = kept if result.hidden is None else result.hidden
            elif isinstance(order, HeadOrder):
                self.logits(kept[list(order.logit_rows)])  # for its collectives alone; rank 0 has the result

    def keep_followers(self) -> None:
        """Tell the other ranks that rank 0 lives, and learn that they do; raises EngineLostError. For idle times."""
        self._lead(Order.STAY)

    def dismiss_followers(self) -> None:
        """End the other ranks' `follow`."""
        self._lead(Order.LEAVE)

    def _lead(self, order: PassOrder | HeadOrder | Order) -> None:
        if self._ranks.size > 1 and self._ranks.rank == 0:
            self._ranks.share(encode_order(order))

    def _compiled(self, plan: LayerPlan, layers: range, *, has_head: bool) -> _CompiledPass:
        key = (plan, layers, has_head)
        found = self._passes.pop(key, None) or self._compile(plan, layers, has_head=has_head)
        self._passes[key] = found  # the last one is the most recently used
        if len(self._passes) > _MAX_PROGRAMS:
            self._passes.popitem(last=False)
        return found

    def _compile(self, plan: LayerPlan, layers: range, *, has_head: bool) -> _CompiledPass:
        program = ProgramWriter()
        hidden = program.buffer(self.config.hidden_size)
        if layers.start == 0:
            program.add(Embed(self._embeddings, hidden, self.config.spec.embedding_factor))
        groups = GroupWriter(program, self.config, self._rotaries, hidden, self._tensor_shard, self._layer_shard)
        for group in plan.groups:
            if group.start in layers:
                members = self._layers[group.start : group.stop]
                groups.write(members, is_staged=plan.mlp is MlpPlacement.STAGED)
        logits = None
        if has_head:
            selected = program.buffer(self.config.hidden_size, is_selected=True)
            program.add(Select(hidden, selected))
            logits = self._write_head(program, selected)
        return _CompiledPass(self.executor.compile(program, self._ranks), hidden, logits, program.buffers)

    def _write_head(self, program: ProgramWriter, selected: Buffer) -> Buffer:
        normed = program.buffer(self.config.hidden_size, is_selected=True)
        logits = program.buffer(self._head.num_outputs, is_selected=True)
        spec, norm = self.config.spec, self._final_norm
        is_centred = spec.final_norm.kind is NormKind.LAYER
        program.add(
            Norm(selected, normed, norm.weight, spec.final_norm.eps, norm.bias, is_centred),
            Product(normed, logits, self._head),
        )
        if spec.logit_factor != 1.0 or spec.logit_soft_cap is not None:
            program.add(Scale(logits, spec.logit_factor, spec.logit_soft_cap))
        return logits


_NO_CHOICES = torch.empty(0, dtype=torch.int64)
_NO_POOL = KVPool(1, 1, 16, 0, torch.float32, torch.device("cpu"))
