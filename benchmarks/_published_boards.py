"""What is published of MLPerf Tiny's four networks in other runtimes, all of 8 bits, each with its source."""

from __future__ import annotations

from dataclasses import dataclass

MHZ = 120  # of the board behind every throughput below
SOURCES = {
    "zoo": ("ST's model zoo", "https://github.com/STMicroelectronics/stm32ai-modelzoo"),
    "report": (
        "STM32Cube.AI's own report in dippmatt/tinyml-framework-benchmark",
        "https://github.com/dippmatt/tinyml-framework-benchmark/blob/main/src/st/cube_templates/"
        "template_cube_ai_8_1_balanced/.ai/network_model.tflite_report.json",
    ),
    "nano": ("guberti/tvm-arduino-profiling", "https://github.com/guberti/tvm-arduino-profiling"),
    "v0.5": ("MLPerf Tiny v0.5, closed, reference", "https://github.com/mlcommons/tiny_results_v0.5"),
    "v1.1 ST": ("MLPerf Tiny v1.1, closed, STMicroelectronics", "https://github.com/mlcommons/tiny_results_v1.1"),
    "v1.1 Krai": ("MLPerf Tiny v1.1, closed, Krai", "https://github.com/mlcommons/tiny_results_v1.1"),
    "v1.1 Plumerai": ("MLPerf Tiny v1.1, closed, Plumerai", "https://github.com/mlcommons/tiny_results_v1.1"),
}


@dataclass(frozen=True)
class Memory:
    """Flash and RAM of one network, as the source words them."""

    net: str
    runtime: str
    core: str
    flash: str
    ram: str
    source: str


@dataclass(frozen=True)
class Speed:
    """Inferences a second on a Nucleo-L4R5ZI (Cortex-M4, `MHZ`), and the accuracy that was submitted."""

    net: str
    runtime: str
    throughput: float
    accuracy: str
    source: str

    @property
    def cycles(self) -> float:
        """Of one inference, in millions."""
        return MHZ / self.throughput


MEMORY = (
    Memory("resnet8", "STM32Cube.AI 10.0.0", "Cortex-M7", "133.35 KiB (76.9 weights, 56.45 code)",
           "69.72 KiB (62.51 activations with input and output, 7.21 runtime)", "zoo"),
    Memory("mobilenet_v1_025", "STM32Cube.AI 10.0.0", "Cortex-M7", "282.69 KiB (214.69 weights, 68 code)",
           "83.29 KiB (66.96 activations with input and output, 16.33 runtime)", "zoo"),
    Memory("mobilenet_v1_025", "TFLite-Micro, person detection (one grey channel)", "Cortex-M4",
           "441,160 bytes, an empty sketch's 83.4 kB among them", "all of 256 kB but 69,604 bytes", "nano"),
    Memory("autoencoder", "STM32Cube.AI 8.1.0", "Cortex-M4", "270,880 bytes of weights, code not counted",
           "2,048 bytes of activations with input and output", "report"),
)  # fmt: skip
_NETS = ("ds_cnn", "resnet8", "mobilenet_v1_025", "autoencoder")
# source, runtime, median inferences a second, and the accuracy submitted: top 1 in percent, of the autoencoder the AUC
_RUNTIMES = (
    ("v0.5", "TFLite-Micro 2.3.1", (5.497, 1.420, 1.665, 99.487), (90.1, 86.5, 85.4, 0.86)),
    ("v1.1 Krai", "microTVM with CMSIS-NN", (10.019, 2.567, 3.324, 116.212), (90.1, 86.5, 85.4, 0.86)),
    ("v1.1 ST", "STM32Cube.AI 8.1.0", (15.905, 4.673, 8.425, 145.829), (90.2, 85.0, 85.3, 0.86)),
    ("v1.1 Plumerai", "Plumerai 2023.05", (20.929, 5.961, 10.126, 246.814), (90.2, 88.0, 84.9, 0.86)),
)
SPEED = tuple(
    Speed(net, runtime, throughput, f"AUC {accuracy}" if accuracy < 1 else f"{accuracy} %", source)
    for source, runtime, throughputs, accuracies in _RUNTIMES
    for net, throughput, accuracy in zip(_NETS, throughputs, accuracies, strict=True)
)
