"""Check that the fused model is as exact as stock torchtune, and how much faster it is.

Run it with::

    tune run torchtune_fused/recipes/validate.py --config llama3_2_1b/validate

The exit status is 0 if it is as exact, 1 if not.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor
from torchtune.modules import TransformerDecoder

from torchtune_fused.build import kernel_status, load_kernels
from torchtune_fused.generation.decoding import CachedDecoder, empty_caches
from torchtune_fused.modules import FusedAttention
from torchtune_fused.recipe_config import check_count, check_flags, check_seed, expand_path, parse
from torchtune_fused.recipe_model import device_and_dtype, load_model
from torchtune_fused.recipe_timing import race
from torchtune_fused.validation import Comparison, compare, compare_modules, true_logits, twins

Models = dict[str, TransformerDecoder]


@parse
def main(cfg: DictConfig) -> str | None:
    """Check that the fused model is as exact as stock; key=value overrides any key of the config.

    Errors are distances to a truth: the same weights in fp32 (for fp32 weights: fp64) on
    torchtune's modules. Fused may make twice the error of stock plus one rounding. Each module is
    given the same input as stock's; then the whole models are compared by their logits:
    forward   without KV caches
    prefill   the prompt into KV caches, as torchtune's generate does it
    decode    the tokens after it one by one, as torchtune's generate does it
    generate  both as torchtune_fused.generate does them
    Exit status 1 if anything is less exact than that.

    checkpoint     folder of the model, or a repository of the Hugging Face Hub; or null, to build
    model          a component, with random weights
    device, dtype  auto, cuda or cpu; fp32, bf16 or fp16
    seed           of the random tokens, and weights
    batch_size, seq_len, new_tokens
                   so many prompts of so many random tokens, and tokens decoded after them
    every_layer    whether to print all layers, not only the worst of each kind and what fails
    rounds         each time is the median of so many runs, in which stock and fused take turns
    profile        whether to write a profiler's trace of both and, on a GPU, to mark NVTX ranges,
                   in which nsys shows every op by its name
    output_dir     where the trace goes
    """
    device, dtype = device_and_dtype(cfg)
    for key in ("batch_size", "seq_len", "new_tokens", "rounds"):
        check_count(key, cfg[key])
    check_flags(cfg, "every_layer", "profile")
    check_seed(cfg.seed)
    folder = Path(expand_path(cfg.output_dir))
    if cfg.profile:
        folder.mkdir(parents=True, exist_ok=True)  # what fails here need not wait for the model

    stock, fused, swapped = twins(load_model(cfg, device, dtype, patch=False))
    print(f"{cfg.checkpoint or cfg.model['_component_']}, {dtype}, {describe(device)}\n{swapped}")
    if own := sum(isinstance(module, FusedAttention) for module in stock.modules()):
        print(
            f"not compared: {own} attentions of a kind that torchtune has not; stock has ours too"
        )
    models, tokens = {"stock": stock, "fused": fused}, random_tokens(cfg, stock, device)
    with torch.no_grad():
        modules = list(compare_modules(stock, fused, swapped.swapped, tokens))
        logits = compare_logits(models, tokens, cfg.seq_len, dtype)
        write_errors(modules, logits, every_layer=cfg.every_layer)
        write_times(measure(models, tokens, cfg.seq_len, cfg.rounds))
        if cfg.profile:
            profile(models, tokens, cfg.seq_len, folder)
    failed = [comparison.name for comparison in [*modules, *logits] if not comparison.passed]
    if failed:
        return f"less exact than stock: {', '.join(failed)}"
    print("\nas exact as stock")
    return None


def describe(device: torch.device) -> str:
    """The device, what our ops run on there, and torch's version."""
    if device.type != "cuda":
        return f"CPU, torch {torch.__version__}"
    found = "with kernels" if load_kernels() else f"WITHOUT kernels: {kernel_status().reason}"
    return f"{torch.cuda.get_device_name(device)} {found}, torch {torch.__version__}"


def random_tokens(cfg: DictConfig, model: TransformerDecoder, device: torch.device) -> Tensor:
    """Token ids of the prompts, and of what is decoded after them."""
    length = cfg.seq_len + cfg.new_tokens
    if length > model.max_seq_len:
        raise ValueError(
            f"seq_len {cfg.seq_len} and new_tokens {cfg.new_tokens} exceed the model's "
            f"max_seq_len of {model.max_seq_len}"
        )
    generator = torch.Generator().manual_seed(cfg.seed)
    shape = (cfg.batch_size, length)
    return torch.randint(model.tok_embeddings.num_embeddings, shape, generator=generator).to(device)


def forward(model: TransformerDecoder, tokens: Tensor, prompt_len: int) -> Tensor:
    """Logits ``[b, s, vocab_size]`` without KV caches."""
    return model(tokens)


def decode(model: TransformerDecoder, tokens: Tensor, prompt_len: int) -> Tensor:
    """Logits ``[b, s, vocab_size]`` of a prompt and then token by token, as torchtune calls it."""
    batch_size, length = tokens.shape
    with empty_caches(model, batch_size, length) as cache_len:
        visible = torch.ones(length, cache_len, dtype=torch.bool, device=tokens.device).tril()
        positions = torch.arange(length, device=tokens.device)
        logits, start = [], 0
        for end in range(prompt_len, length + 1):
            mask, input_pos = visible[None, start:end], positions[None, start:end]
            logits.append(model(tokens[:, start:end], mask=mask, input_pos=input_pos))
            start = end
    return torch.cat(logits, 1)


def generate(model: TransformerDecoder, tokens: Tensor, prompt_len: int) -> Tensor:
    """Logits ``[b, 1 + new, vocab_size]`` of a prompt's end and then token by token, as we do."""
    batch_size, length = tokens.shape
    with empty_caches(model, batch_size, length) as cache_len:
        cached = CachedDecoder(model, tokens.new_zeros(batch_size), cache_len)
        logits = [cached.prefill(tokens[:, :prompt_len])]
        for column in tokens[:, prompt_len:].T:
            logits.append(cached.step(column).clone())  # the next step overwrites it
    return torch.stack(logits, 1)


RUNS: dict[str, Callable[[TransformerDecoder, Tensor, int], Tensor]] = {
    "forward": forward,
    "decode": decode,
    "generate": generate,
}


def compare_logits(
    models: Models, tokens: Tensor, prompt_len: int, dtype: torch.dtype
) -> list[Comparison]:
    """Compare the whole models, in every way that they are run."""
    truth = true_logits(models["stock"], tokens)
    logits = {
        name: [run(model, tokens, prompt_len) for model in models.values()]
        for name, run in RUNS.items()
    }
    prompt, new = slice(None, prompt_len), slice(prompt_len, None)
    parts = {
        "forward": (*logits["forward"], truth),
        "prefill": (*(x[:, prompt] for x in logits["decode"]), truth[:, prompt]),
        "decode": (*(x[:, new] for x in logits["decode"]), truth[:, new]),
        "generate": (*logits["generate"], truth[:, prompt_len - 1 :]),
    }
    return [compare(name, *results, dtype) for name, results in parts.items()]


def measure(
    models: Models, tokens: Tensor, prompt_len: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Seconds of each model for a forward pass, a prefill, and a decoding step of either kind."""
    prompt, steps = tokens[:, :prompt_len], tokens.shape[1] - prompt_len

    def time(name: str, tokens: Tensor, title: str) -> dict[str, float]:
        systems = {w: partial(RUNS[name], m, tokens, prompt_len) for w, m in models.items()}
        return race(systems, rounds, title)

    seconds = {"forward": time("forward", tokens, "forward")}
    # Caches that stay where they are, as a captured step needs them.
    with empty_caches(models["stock"], *tokens.shape), empty_caches(models["fused"], *tokens.shape):
        for name in ("decode", "generate"):
            first = time(name, prompt, f"{name}: prefill")
            whole = time(name, tokens, name)
            seconds.setdefault("prefill", first)  # torchtune's, which projects every position
            seconds[f"{name} step"] = {w: (whole[w] - first[w]) / steps for w in models}
    return seconds


def profile(models: Models, tokens: Tensor, prompt_len: int, folder: Path) -> None:
    """Write a trace of all runs; on a GPU, run them once more with NVTX ranges marked.

    The caches are fresh, so that a fused model's first decoding step runs op by op, under their
    names; the second is captured, and all others are replays, in which only kernels have names.
    """

    def run_all() -> None:
        for who, model in models.items():
            for name, run in RUNS.items():
                with torch.profiler.record_function(f"{who} {name}"):
                    run(model, tokens, prompt_len)

    # On a CPU without autograd, ops are called past the dispatcher, where profilers see them.
    with torch.set_grad_enabled(not tokens.is_cuda), torch.profiler.profile() as profiler:
        run_all()
    path = folder / "trace.json"
    profiler.export_chrome_trace(str(path))
    print(f"\ntrace written to {path}, to be opened at https://ui.perfetto.dev")
    if tokens.is_cuda:
        with torch.autograd.profiler.emit_nvtx():
            run_all()
        print("NVTX ranges are marked: run under `nsys profile --trace cuda,nvtx` to see them")
    else:
        print("no NVTX ranges are marked: they need a GPU")


def write_errors(modules: list[Comparison], logits: list[Comparison], *, every_layer: bool) -> None:
    """Write a table: the worst module of each kind, what fails, and the whole model."""
    shown = [(m, "") for m in modules] if every_layer else worst_of_each_kind(modules)
    shown += [(run, f"argmax as stock: {run.same_argmax:.2%}") for run in logits]
    wide = max(len(comparison.name) for comparison, _ in shown)
    shape = max(len(comparison.output) for comparison, _ in shown)
    print(f"\n{'':{wide}}  {'':{shape}}  {'max error':>19}  {'relative error':>19}   error")
    columns = f"{'stock':>9} {'fused':>9}"
    print(f"{'':{wide}}  {'output':{shape}}  {columns}  {columns}  / limit")
    for row, note in shown:
        errors = "  ".join(
            f"{stock:9.2e} {fused:9.2e}"
            for stock, fused in (
                (row.stock.largest, row.fused.largest),
                (row.stock.relative, row.fused.relative),
            )
        )
        verdict = note if row.passed else f"FAIL {note}"
        line = f"{row.name:{wide}}  {row.output:{shape}}  {errors}  {row.of_limit:7.2f}  {verdict}"
        print(line.rstrip())


def worst_of_each_kind(modules: list[Comparison]) -> list[tuple[Comparison, str]]:
    """Of modules that differ only by their layer, the one closest to its limit, and all failing."""
    kinds: dict[str, list[Comparison]] = {}
    for module in modules:
        kinds.setdefault(re.sub(r"\b\d+\b", "*", module.name), []).append(module)
    shown = []
    for kind in kinds.values():
        failing = [(module, "") for module in kind if not module.passed]
        worst = max(kind, key=lambda module: module.of_limit)
        shown += failing or [(worst, f"worst of {len(kind)}" if len(kind) > 1 else "")]
    return shown


def write_times(seconds: dict[str, dict[str, float]]) -> None:
    """Write the times of both models, and how many times faster the fused one is."""
    print(f"\n{'median ms':14} {'stock':>10} {'fused':>10}")
    for work, of in seconds.items():
        stock, fused = of["stock"], of["fused"]
        print(f"{work:14} {1e3 * stock:10.3f} {1e3 * fused:10.3f} {stock / fused:7.2f}x")


if __name__ == "__main__":
    main()
