"""What others publish for designs like ours: speed-ups over fp16 or bf16 cuBLAS, W4 with groups of 128.

Read off gemlite's plots (gemlite, tinygemm from torchao, Marlin from vLLM), for 1, 8, 16, 32 and 64 tokens.
Their figures, not measured here. Four bits and a 16-bit scale per 128 read 1/3.88 of bf16's bytes, so a
speed-up of 3.88 is the full bandwidth of whatever cuBLAS itself reaches.
"""

TOKENS = (1, 8, 16, 32, 64)
IDEAL = 16 / 4.125
SPEEDUPS = {
    ("H100", "4096^2"): {
        "Marlin": (1.65, 1.66, 1.63, 1.03, 0.70),
        "tinygemm": (2.32, 1.50, 1.03, 0.59, 0.30),
        "gemlite": (1.68, 1.38, 1.28, 1.16, 0.74),
    },
    ("H100", "8192^2"): {
        "Marlin": (2.20, 2.19, 2.21, 1.98, 1.48),
        "tinygemm": (2.26, 1.24, 0.76, 0.43, 0.20),
        "gemlite": (1.78, 1.30, 1.29, 1.20, 0.73),
    },
    ("H100", "16384^2"): {
        "Marlin": (2.60, 2.56, 2.58, 2.38, 1.86),
        "tinygemm": (2.43, 1.02, 0.63, 0.33, 0.17),
        "gemlite": (1.46, 1.20, 1.18, 1.08, 0.89),
    },
    ("A100", "16384^2"): {
        "Marlin": (2.86, 2.87, 2.94, 2.72, 1.93),
        "tinygemm": (2.66, 1.22, 0.69, 0.38, 0.19),
        "gemlite": (1.50, 1.34, 1.33, 1.23, 0.77),
    },
    ("RTX 4090", "16384^2"): {
        "Marlin": (2.82, 3.02, 3.02, 3.16, 3.11),
        "tinygemm": (2.75, 2.86, 1.40, 0.76, 0.39),
        "gemlite": (3.35, 3.50, 3.50, 3.73, 2.91),
    },
}
# What a design's own sources say of its decode kernel; "-": not published.
DESIGNS = (
    ("Marlin", "lop3 into fragments, cp.async 4 stages, striped split-K; 256 threads", "0", "-", "-"),
    ("tinygemm", "fragment order, bf16 magic numbers, no split-K; 128 threads", "0", "-", "-"),
    ("gemlite", "(q >> s) & 15 to fp16 by I2F, split-K by atomics", "1 per weight", "6.5-6.8 *", "1.91 *"),
)
