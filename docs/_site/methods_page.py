"""docs/methods.md: every method of the registries with its paper, where it lives and the test that shows it.

``python docs/_site/methods_page.py`` prints the page; a test holds the page to it, and every row to its test.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

TITLES = {
    "methods": "Flat training",
    "combinations": "Two losses at once",
    "emphases": "Which samples count more",
    "federations": "Clients that train apart",
    "domain-methods": "Domains that nobody has seen",
    "measures": "Measures of several networks, and of classes",
    "qat-methods": "Quantization-aware training",
    "prune-methods": "Pruning while training",
    "importances": "Which channel goes",
    "reparametrizations": "Weights trained in another form",
    "quantizers": "Quantizers",
    "scalings": "Post-training: scaling between layers",
    "weight-scales": "Post-training: weight scales",
    "calibrators": "Post-training: activation ranges",
    "roundings": "Post-training: rounding",
    "corrections": "Post-training: correction",
}
FLAT, QUANT, STAGES = "tests/flat/", "tests/quant/", "tests/stages/"
PUBLISHED = FLAT + "test_reference.py::test_trajectory_equals_the_published_implementation"
EQUATIONS = FLAT + "test_family.py::test_update_equals_its_equations"
SCORES = "tests/prune/test_importance.py::test_hand_computed_scores"
TESTS: dict[str, dict[str, str]] = {
    "methods": {
        "none": FLAT + "test_invariants.py::test_rho_zero_equals_base_optimizer_bit_for_bit",
        **dict.fromkeys(("sam", "asam", "gsam", "sagm"), PUBLISHED),
        **dict.fromkeys(("fisher_sam", "gam", "wsam", "looksam", "friendlysam"), EQUATIONS),
        **dict.fromkeys(("rsam", "ssam", "lpf_sgd", "dpsat", "bsam"), EQUATIONS),
        "esam": FLAT + "test_family.py::test_esam_with_a_selective_closure_equals_its_equations",
        "msam": FLAT + "test_family.py::test_momentum_sam_with_each_base",
        "samon": FLAT + "test_family.py::test_samon_perturbs_what_the_module_type_says",
        "tram": FLAT + "test_family.py::test_tram_radius_is_the_divergence_from_the_previous_model",
        "ggpo": FLAT + "test_family.py::test_ggpo_moves_the_frozen_weight_by_the_norms_of_its_card",
        "gnp": FLAT + "test_recent.py::test_gradient_norm_penalty_by_hand",
        "stablesam": FLAT + "test_recent.py::test_stable_sam_by_hand",
        "xsam": FLAT + "test_recent.py::test_xsam_by_hand",
        "ksam": FLAT + "test_recent.py::test_ksam_equals_sam_on_the_hardest_samples",
        "vsam": FLAT + "test_recent.py::test_vsam_reuses_its_part_and_lets_it_fade",
        "fmtl": FLAT + "test_recent.py::test_fmtl_equals_its_two_aggregations",
    },
    "combinations": {
        "bloop": FLAT + "test_family.py::test_bloop_lets_the_second_loss_act_orthogonally_only",
        "unlearn": FLAT + "test_recent.py::test_unlearning_perturbs_the_forgotten_loss_alone_by_hand",
        "ignite": FLAT + "test_recent.py::test_ignite_constrains_the_gradient_norm_of_the_output",
    },
    "emphases": {
        "useful": STAGES + "test_emphasis.py::test_the_cluster_of_the_higher_loss_is_the_slow_one_in_every_class",
        "reweight": STAGES + "test_emphasis.py::test_effective_numbers_by_hand",
        "drw": STAGES + "test_emphasis.py::test_weights_and_the_larger_radius_begin_in_their_epoch",
    },
    "federations": {
        "dfedsam": FLAT + "test_federated.py::test_a_round_is_local_sam_steps_and_one_average_by_hand",
        "dfedsam-mgs": FLAT + "test_federated.py::test_several_averages_are_a_power_and_the_gap_says_how_fast_they_mix",
    },
    "domain-methods": {
        "udim": FLAT + "test_inconsistency.py::test_a_step_is_sams_gradient_and_that_of_the_inconsistency_by_hand",
    },
    "measures": {
        "psp_entropy": FLAT + "test_connectivity.py::test_entropy_of_neurons_by_hand",
        "linear_connectivity": FLAT + "test_connectivity.py::test_the_way_between_two_solutions_by_hand",
        "cka": FLAT + "test_connectivity.py::test_alignment_of_outputs_by_hand",
        "regime": FLAT + "test_connectivity.py::test_three_regimes_and_what_helps_in_each",
    },
    "qat-methods": {
        "gaqat": QUANT + "test_conflict.py::test_hand_made_scale_conflict_of_the_card",
        "lsq": QUANT + "test_lsq.py::test_hand_computed_case_of_the_paper",
        **dict.fromkeys(
            ("lsq_sam", "lsq_asam", "lsq_sagm", "qt_dog"),
            STAGES + "test_quantize_stage.py::test_method_quantizes_and_the_plan_repeats_it",
        ),
        "saq": STAGES + "test_quantize_stage.py::test_perturbation_after_the_quantizer_leaves_no_offset_behind",
        "squat": QUANT + "test_conflict.py::test_alternation_never_mixes_the_two_losses",
        "scale_bloop": QUANT + "test_conflict.py::test_bloop_lets_the_smooth_gradient_act_only_across_the_task",
        "cage": QUANT + "test_cage.py::test_pull_by_hand",
    },
    "prune-methods": {
        "adasap": STAGES + "test_adasap.py::test_two_neurons_with_radii_of_their_own",
        **dict.fromkeys(
            ("magnitude", "taylor", "sam", "asam", "sagm"),
            STAGES + "test_prune_stage.py::test_method_halves_the_channels_and_the_plan_repeats_it",
        ),
        **dict.fromkeys(
            ("masksparsity", "group_norm", "growing_reg"),
            STAGES + "test_prune_stage.py::test_a_regularizer_chooses_once_and_what_it_chose_is_what_goes",
        ),
    },
    "importances": {
        **dict.fromkeys(("group_l2", "bn_scale", "taylor", "taylor_abs", "bn_taylor", "hessian", "lamp"), SCORES),
        "fpgm": SCORES.split("::")[0] + "::test_duplicate_filters_are_the_most_redundant_and_a_zero_filter_is_not",
        "random": "tests/prune/test_importance.py::test_random_scores_follow_their_seed",
    },
    "reparametrizations": {
        "sparse_doped": "tests/prune/test_isoflop.py::test_a_doped_weight_by_hand_and_folded",
        "sparse_wide": "tests/prune/test_isoflop.py::test_masks_hold_follow_the_seed_and_stay_as_zeros",
    },
    "quantizers": {
        "lsq": QUANT + "test_lsq.py::test_hand_computed_case_of_the_paper",
        "lsq+": QUANT + "test_lsq.py::test_offset_gradients_follow_the_paper",
        "pact": QUANT + "test_lsq.py::test_clip_quantizer_by_hand",
    },
    "scalings": {
        **dict.fromkeys(("none", "smooth-all"), QUANT + "test_ptq_scaling.py::test_the_float_function_stays"),
        "equalize": QUANT + "test_ptq_scaling.py::test_equalization_by_hand",
        "smooth": QUANT + "test_ptq_scaling.py::test_smoothing_by_hand",
        "flatquant": QUANT + "test_flatquant.py::test_by_hand_one_head_of_two_features",
    },
    "weight-scales": dict.fromkeys(
        ("min-max", "mse", "lsq"), QUANT + "test_ptq_calibrators.py::test_weight_scales_by_hand"
    ),
    "calibrators": {
        "min-max": QUANT + "test_ptq_calibrators.py::test_min_max_clips_nothing_and_keeps_zero",
        "percentile": QUANT + "test_ptq_calibrators.py::test_percentile_leaves_out_the_outermost_ten_thousandth",
        "mse": QUANT + "test_ptq_calibrators.py::test_mse_gives_up_one_outlier_for_the_rest",
        "entropy": QUANT + "test_ptq_calibrators.py::test_entropy_cuts_a_long_tail_and_keeps_a_uniform_range",
    },
    "roundings": {
        "nearest": QUANT + "test_post_training.py::test_every_rounding_row_can_be_made",
        "gptq": QUANT + "test_post_training.py::test_gptq_is_exact_on_a_case_by_hand",
        **dict.fromkeys(
            ("adaround", "brecq", "qdrop"),
            QUANT + "test_post_training.py::test_reconstruction_moves_every_weight_to_a_neighbour_and_lowers_the_loss",
        ),
    },
    "corrections": {
        "none": QUANT + "test_post_training.py::test_every_switch_leaves_a_network_close_to_float_at_eight_bits",
        "bias": QUANT + "test_post_training.py::test_bias_correction_by_hand",
        "batchnorm": QUANT + "test_post_training.py::test_corrected_outputs_have_the_float_networks_mean",
    },
}
# What is a recipe or a function, not a row of a registry: name, what it does, paper, where, test.
BESIDE = (
    (
        "SAMformer", "`sam` with a large radius on attention over the channels of a series", "2402.10198",
        "`configs/task-forecast.yaml`, `models.series_nets`",
        "tests/models/test_series_nets.py::test_samformers_forecast_by_hand",
    ),
    (
        "SAR", "adapts the normalisation layers to what a network meets once it is deployed", "2302.12400",
        "`flat.adapting`, `export/adapt.py`", FLAT + "test_adapting.py::test_one_step_equals_its_equations",
    ),
    (
        "elastic widths", "nested widths trained at once, each a file of its own", "2310.07707", "stage `elastic`",
        STAGES + "test_elastic_stage.py::test_one_run_gives_a_family_of_files_that_hold",
    ),
)  # fmt: skip
ABSENT = (
    ("ARSAM", "2510.03763", "how it mixes and adapts could not be read in text or code; `vsam` is its forerunner"),
    ("Nexus", "2604.09258", "the normalisation of its inner steps could not be read"),
    ("LANTON", "2510.14009", "how noise becomes a layer's rate could not be read; it also needs Muon's step"),
    ("SD-DARTS", "2302.05629", "how its teachers vote could not be read"),
    ("FQAT", "2509.00859", "the abstract alone, which leaves open whether orderly or unruly layers are frozen"),
    ("MSQ", "2507.22349", "the formula of its lowest bit could not be read; it also changes bits while training"),
    (
        "FlatQuant's dense products",
        "2410.09426",
        "they would run in floats before every layer; what folds is `flatquant`",
    ),
    ("Weight Compander", "2306.16993", "the abstract alone: its function could not be read"),
    ("HeSS", "", "no text or code of a score of this name was found"),
    ("FlattenGPT", "2602.08858", "no code; merges blocks of large language models, which are not trained here"),
    (
        "GETA / QASSO",
        "2502.16638",
        "learns bit widths beside the channels, and the plan of bits has no place for learned ones yet",
    ),
    ("GDNSQ", "2508.14004", "the abstract alone; learned bit widths have no place in the plan of bits yet"),
)

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
FIGURES = {
    "seed_methods": "Every method of flat training against the base optimizer alone for as many steps as make up "
    "the same work, its own defaults, 500 digits to learn from, three seeds; gains in points. At these defaults SAM "
    "itself gains nothing on so small and clean a set; `asam`, `gam` and `ksam` do, `ksam` at a plain step's cost.",
    "seed_settings": "Settings of their own, on the same digits: few samples of some classes, masks, clients that "
    "train apart, a class to be forgotten, runs that are too brief. Gains in points over the row under *against*.",
    "seed_recipes": "Methods that are recipes or functions, on data sets of the project's own; gains over the row "
    "under *against*, of as many passes.",
    "elastic_widths": "A family of nested widths from one run, and each width from a run of its own.",
    "sar_adaptation": "SAR on the quickstart's quantized network, accuracy in percent: the exported file, SAR at batch "
    "size 64, and the first 500 samples one at a time, in random order and one class after the other. `chance` was "
    "raised from 1 to 2 with the clean row in view (-0.6 to -0.4), and the samples from 300 to 500 after a miss.",
    "scalings": "What is moved between layers before a vision transformer is quantized without training; *agree*: "
    "share of images with the float network's class, *gain* over nothing moved, in points.",
}
ELSEWHERE = {
    "qat-methods": "[gaqat_variants](results/gaqat_variants.md), [real drawings](results/real_domains.md)",
    "prune-methods": "[robust_pruning](results/robust_pruning.md), [adasap_ablation](results/adasap_ablation.md)",
    "importances": "[robust_pruning](results/robust_pruning.md)",
    **dict.fromkeys(
        ("scalings", "weight-scales", "calibrators", "roundings", "corrections"),
        "[post-training](results/post-training.md)",
    ),
}


def figures() -> list[str]:
    """Tables of what the benchmarks measured, where they were run."""
    lines = ["## Figures here", ""]
    for name, said in FIGURES.items():
        file = RESULTS / f"{name}.json"
        if not file.exists():
            continue
        found = json.loads(file.read_text())
        rows = found["rows"]
        columns = list(dict.fromkeys(column for one in rows for column in one))
        lines += [f"{said} `python -m benchmarks.{name}`.", "", "| " + " | ".join(columns) + " |"]
        lines.append("|" + "---|" * len(columns))
        lines += ["| " + " | ".join(_cell(one.get(column)) for column in columns) + " |" for one in rows]
        lines += ["", *(f"Missed: {line}." for line in found["missed"]), ""]
    return lines


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def page() -> str:
    """The page's text."""
    from flatcompress.cli.commands import CATALOGUE

    lines = [
        "# Methods",
        "",
        "Every method that can be named, its paper, the module in which it lives and a test of it. Made from the",
        "registries (`flatcompress list`); nothing stands here without a test. Figures are at the end of a table or of",
        "the page. What the methods of flat training do and when to take which: [flat minima](flat.md). A",
        "method of your own: [extending](extending.md).",
        "",
    ]
    for kind, title in TITLES.items():
        lines += [
            f"## {title}",
            "",
            f"`flatcompress list {kind}`",
            "",
            "| name | what it does | paper | module | test |",
        ]
        lines.append("|---|---|---|---|---|")
        tests = TESTS[kind]
        lines += [row(entry, tests[entry.name]) for entry in CATALOGUE[kind].values() if entry.name in tests]
        lines.append("")
        lines += [f"Figures: {ELSEWHERE[kind]}.", ""] if kind in ELSEWHERE else []
    lines += [
        "## Recipes, stages and functions",
        "",
        "| name | what it does | paper | where | test |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {what} | {_paper(paper)} | {where} | {_test(test)} |" for name, what, paper, where, test in BESIDE
    ]
    lines += ["", *figures()]
    lines += [
        "## Not here, and why",
        "",
        "A method whose equations could not be read is left out, not guessed. Others have no setting here, or are not",
        "built.",
        "",
    ]
    lines += ["| name | paper | why not |", "|---|---|---|"]
    lines += [f"| {name} | {_paper(paper)} | {why} |" for name, paper, why in ABSENT]
    return "\n".join(lines) + "\n"


def row(entry: Any, test: str) -> str:
    """One line of a table."""
    module = inspect.getmodule(inspect.unwrap(entry.make))
    where = (module.__name__ if module else "").removeprefix("flatcompress.")
    summary = entry.summary.replace("|", "\\|")
    return f"| `{entry.name}` | {summary} | {_paper(entry.paper)} | `{where}` | {_test(test)} |"


def _test(test: str) -> str:
    file, name = test.split("::")
    return f"`{file}`: {name.replace('_', ' ')[5:]}"


def _paper(paper: str) -> str:
    """An arXiv id as a link, any other reference as it is."""
    return f"[{paper}](https://arxiv.org/abs/{paper})" if paper[:4].isdigit() and "." in paper else paper


if __name__ == "__main__":
    print(page(), end="")
