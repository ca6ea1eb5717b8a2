"""The end of large_model.py: its figures in words, and whether its claims hold."""

from typing import Any

GIB = 2**30
CARD_BYTES = 22 * GIB  # peak on a GPU of 24 GB, under a limit of 20 GiB
CARD_LIMIT_BYTES = 20 * GIB
BOUND_SHARE = 0.5  # of the smaller bound, with weights from disk
PRODUCTS_SHARE = 0.4  # of the rate of matrix products, with the model whole on a GPU
RESIDENT_SHARE, BESIDE_BYTES = (
    1 / 4,
    GIB,
)  # of the float32 weights on a processor; Python, its packages and a block beside them
SLOWER = 1.3  # from disk against the model whole


def claims(result: dict[str, Any]) -> dict[str, bool]:
    """Claim -> whether it holds, for the claims on a run of this kind."""
    measured, limit = result["measured"], result["memory_limit_bytes"]
    on_gpu, on_disk = result["device"].startswith("cuda"), measured["on_disk"]
    verdicts = {}
    if on_gpu and (result["shape"] == "70b" or (limit is not None and limit <= CARD_LIMIT_BYTES)):
        verdicts[f"peak of the GPU under {CARD_BYTES / GIB:.0f} GiB"] = peak_of_gpu(measured) < CARD_BYTES
    if on_disk:
        claim = f"gradients of all blocks, from disk, reach {BOUND_SHARE:.0%} of the smaller bound"
        verdicts[claim] = result["all_blocks_share_of_bound"] >= BOUND_SHARE
    elif on_gpu:
        claim = f"gradients in memory reach {PRODUCTS_SHARE:.0%} of the rate of matrix products"
        verdicts[claim] = result["share_of_products"] >= PRODUCTS_SHARE
    if on_disk and not on_gpu:
        most = RESIDENT_SHARE * 4 * measured["weights"] + BESIDE_BYTES
        claim = f"peak of the process at most a quarter of the float32 weights and 1 GiB: {most / GIB:.2f} GiB"
        verdicts[claim] = measured["peak_rss_of_all_bytes"] <= most
    return verdicts


def peak_of_gpu(measured: dict[str, Any]) -> int:
    """Bytes of the GPU in use, as the driver sees it, or what torch reserved if the driver does not say or there are several."""
    driver = measured["peak_device_of_all_bytes"] if measured["devices"] == 1 else None
    return int(driver or measured["peak_gpu_reserved_bytes"])


def show(result: dict[str, Any]) -> None:
    """Print the main figures."""
    for label, value in _lines(result):
        print(f"{label:26} {value}", flush=True)


def _lines(result: dict[str, Any]) -> list[tuple[str, str]]:
    measured, most = result["measured"], result["ceilings"]
    reading = f"{measured['bytes_per_s'] / 1e9:.2f} GB/s of {most['read_bytes_per_s'] / 1e9:.2f}"
    several = {key: value for key, value in measured.get("several", {}).items() if key != "one_device"}
    return [
        (
            "weights",
            f"{measured['weights'] / 1e9:.2f} billion, blocks {'on disk' if measured['on_disk'] else 'in memory'}",
        ),
        ("written in", f"{result['write_s']:.1f} s, loaded in {measured['load_s']:.1f} s"),
        ("seconds", f"{measured['seconds']:.1f}"),
        *(
            (f"... {name.removesuffix('_s')}", f"{value:.2f}")
            for name, value in measured.items()
            if "block_s" in name or name in ("forward_s", "backward_s")
        ),
        ("devices", str(measured["devices"])),
        *((f"... {key}", f"{value:.2f}" if isinstance(value, float) else str(value)) for key, value in several.items()),
        ("rate", f"{measured['flops'] / 1e12:.2f} TFLOP/s of {most['product_flops'] / 1e12:.2f}"),
        ("reading", reading if measured["on_disk"] else "none"),
        (
            "share of the bound",
            f"{result['share_of_bound']:.2f}, of a block {result.get('block_share_of_bound', 0):.2f}",
        ),
        (
            "all blocks of the shape",
            f"{result['all_blocks_s']:.0f} s (a product), {result['all_blocks_share_of_bound']:.2f} of the bound",
        ),
        ("peak of the GPU", f"{(measured['peak_gpu_bytes'] or 0) / GIB:.2f} GiB"),
        (
            "peak of the process",
            f"{measured['peak_rss_bytes'] / GIB:.2f} GiB, {measured['peak_rss_before_bytes'] / GIB:.2f} before",
        ),
    ]
