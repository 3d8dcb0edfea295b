"""What the dashboards show."""

from __future__ import annotations

from queries import OR_ZERO, Dashboard, Panel, gauge, gauges, quantiles, rate, rates

FAULTS = "INTERNAL|UNKNOWN|UNAVAILABLE|DATA_LOSS"  # ours; refusals, deadlines and callers' mistakes are not
EDGES = 'service=~"gateway|GenerationService"'
GENERATIONS = 'service="GenerationService", method="Generate"'
STAGE = 'stage=~"$stage"'
PRIOR = 'stage="prior"'
CACHED = 'stage=~"prior|decoder"'

FAILED = rate("request_seconds_count", f'{GENERATIONS}, code=~"{FAULTS}"') + OR_ZERO
HITS, MISSES = (rate(f"prefix_cache_{name}_total", STAGE, "stage") for name in ("hits", "misses"))
ROWS, PASSES = (rate(f"engine_batch_rows_{name}", STAGE, "stage") for name in ("sum", "count"))
BUSY = "rate(colaserve_engine_step_seconds_sum{NS}[WINDOW])"
FIRST_BLOCKS = rate("engine_time_to_first_block_seconds_count", PRIOR)
NEXT_BLOCKS = rate("engine_inter_block_seconds_count", PRIOR)
BLOCKS = f"({FIRST_BLOCKS} + {NEXT_BLOCKS})"

CALLERS = [
    Panel(
        "Calls",
        "reqps",
        "HTTP requests at the gateway and calls of GenerationService, by status.",
        rates("request_seconds_count", EDGES, by="service, code"),
    ),
    Panel(
        "Share of generations that failed by our fault",
        "percentunit",
        "Without refusals, deadlines and callers' mistakes. The objective is at most 0.1 %.",
        {"failed": f"({FAILED}) / {rate('request_seconds_count', GENERATIONS)}"},
    ),
    Panel(
        "Calls being served",
        "short",
        "Waiting ones included.",
        gauges("requests_in_progress", by="service"),
    ),
    Panel(
        "Refused",
        "reqps",
        "Calls turned away because a bound was reached; callers were told when to come back.",
        rates("refused_total", by="stage, reason", or_zero=True),
    ),
]

SPEED = [
    Panel(
        "Seconds of an HTTP request",
        "s",
        "From arrival to the last byte.",
        quantiles("request_seconds", 'service="gateway", method=~"/v1/.*completions"'),
    ),
    Panel(
        "Seconds to the first block",
        "s",
        "From a generation's arrival at the coordinator.",
        quantiles("time_to_first_block_seconds"),
    ),
    Panel("Seconds between blocks", "s", "Of a generation.", quantiles("inter_block_seconds")),
    Panel(
        "Tokens a second",
        "short",
        "Read (prompt) and written (completion).",
        rates("tokens_total", by="direction"),
    ),
]

HEALTH = [
    Panel(
        "Replicas that answer",
        "short",
        "To Prometheus, by role.",
        {"{{role}}": 'sum by (role) (up{NS, job="colaserve"})'},
        "stat",
    ),
    Panel("Versions", "short", "Processes by version.", gauges("build_info", "count", by="version"), "stat"),
    Panel("Waiting", "short", "Sessions or calls in the queues.", gauges("engine_queue_depth", by="stage")),
    Panel("Running", "short", "Sessions or calls.", gauges("engine_running", by="stage")),
    Panel(
        "Streams moved to another replica",
        "reqps",
        "resumed: the caller saw nothing; failed: the caller saw an error.",
        rates("failovers_total", by="stage, outcome", or_zero=True),
    ),
    Panel(
        "Blocks written for nothing",
        "percentunit",
        "Of all blocks of the prior: those after the end of a text. The price of running ahead.",
        {"wasted": f"{rate('wasted_blocks_total')} / {BLOCKS}"},
    ),
]

LOAD = [
    Panel("Waiting", "short", "By replica.", gauges("engine_queue_depth", where=STAGE, by="stage, instance")),
    Panel("Running", "short", "By replica.", gauges("engine_running", where=STAGE, by="stage, instance")),
    Panel(
        "Refused",
        "reqps",
        "queue: full; kv: no memory; deadline: passed before the end; calls, client, rate: limits at the edge.",
        rates("refused_total", STAGE, by="stage, reason", or_zero=True),
    ),
    Panel(
        "Calls",
        "reqps",
        "gRPC calls at the stages, by status.",
        rates("request_seconds_count", 'service=~"(Encoder|Prior|Decoder)Service"', by="service, method, code"),
    ),
]

PASS = [
    Panel(
        "Seconds of a step",
        "s",
        "One forward pass.",
        quantiles("engine_step_seconds", STAGE, "stage"),
    ),
    Panel(
        "Rows of a step",
        "short",
        "Latent positions that share a forward pass, on average.",
        {"{{stage}}": f"{ROWS} / {PASSES}"},
    ),
    Panel("Latents a second", "short", "Rows of all forward passes.", {"{{stage}}": ROWS}),
    Panel(
        "Device busy",
        "percentunit",
        "Share of time in forward passes, by replica.",
        rates("engine_step_seconds_sum", STAGE, by="stage, instance"),
    ),
]

STREAMS = [
    Panel(
        "Seconds to a session's first block",
        "s",
        "Prior and decoder.",
        quantiles("engine_time_to_first_block_seconds", STAGE, "stage"),
    ),
    Panel(
        "Seconds between a session's blocks",
        "s",
        "Prior and decoder.",
        quantiles("engine_inter_block_seconds", STAGE, "stage"),
    ),
    Panel(
        "Tokens or latents a second",
        "short",
        "Into (in) and out of (out) the stage.",
        rates("engine_tokens_total", STAGE, by="stage, direction"),
    ),
    Panel(
        "Bytes of messages",
        "Bps",
        "By service and direction.",
        rates("transfer_bytes_total", by="service, direction"),
    ),
]

MEMORY = [
    Panel("KV reserved", "bytes", "By replica.", gauges("engine_kv_bytes", where=STAGE, by="stage, instance")),
    Panel(
        "KV in use",
        "percentunit",
        "Share of the budget, the fullest replica.",
        gauges("engine_kv_utilization_ratio", "max", STAGE, by="stage"),
    ),
    Panel(
        "Leading blocks found in the prefix cache",
        "percentunit",
        "Of all that were looked up.",
        {"{{stage}}": f"{HITS} / ({HITS} + {MISSES})"},
    ),
    Panel("Prefix cache", "bytes", "By replica.", gauges("prefix_cache_bytes", where=STAGE, by="stage, instance")),
    Panel(
        "Reading the weights took",
        "s",
        "The slowest replica.",
        gauges("weights_load_seconds", "max", STAGE, by="stage"),
        "stat",
    ),
]

PROCESS = 'NS, job="colaserve"'
PROCESSES = [
    Panel(
        "CPU cores in use",
        "short",
        "By replica. Gateways and coordinators have one event loop each: at 1 they are full.",
        {"{{role}} {{instance}}": f"rate(process_cpu_seconds_total{{{PROCESS}}}[WINDOW])"},
    ),
    Panel(
        "Resident memory",
        "bytes",
        "By replica.",
        {"{{role}} {{instance}}": f"process_resident_memory_bytes{{{PROCESS}}}"},
    ),
    Panel(
        "Open files",
        "short",
        "By replica, connections among them.",
        {"{{role}} {{instance}}": f"process_open_fds{{{PROCESS}}}"},
    ),
]

REPLICAS = [
    Panel("Replicas", "short", "By stage.", gauges("engine_kv_budget_bytes", "count", by="stage"), "stat"),
    Panel(
        "Replicas needed at 70 % busy",
        "short",
        "Busy devices over 0.7. An upper bound: a busy replica whose passes have few rows can still take more.",
        {"{{stage}}": f"sum by (stage) ({BUSY}) / 0.7"},
    ),
    Panel("Busy", "percentunit", "Average of a stage's replicas.", {"{{stage}}": f"avg by (stage) ({BUSY})"}),
]

WORK = [
    Panel("Blocks of the prior a second", "short", "All replicas.", {"blocks": BLOCKS}),
    Panel(
        "Forward passes of the prior for a block",
        "short",
        "Steps of the sampler over the sessions that share a pass: falls under load.",
        {"passes": f"{rate('engine_step_seconds_count', PRIOR)} / {BLOCKS}"},
    ),
    Panel(
        "Device seconds of the prior for a block",
        "s",
        "What a block costs at this load.",
        {"seconds": f"{rate('engine_step_seconds_sum', PRIOR)} / {BLOCKS}"},
    ),
    Panel(
        "Device seconds of a latent",
        "s",
        "Step seconds over rows; flat once the device is full.",
        {"{{stage}}": f"{rate('engine_step_seconds_sum', by='stage')} / {rate('engine_batch_rows_sum', by='stage')}"},
    ),
    Panel(
        "Tokens of a generation",
        "short",
        "Read and written, on average.",
        {
            "{{direction}}": f"{rate('tokens_total', by='direction')} / on () group_left () "
            + rate("request_seconds_count", GENERATIONS)
        },
    ),
]

ROOM = [
    Panel(
        "Running sessions of a replica",
        "short",
        "Average; the autoscalers' second metric.",
        gauges("engine_running", "avg", by="stage"),
    ),
    Panel(
        "Waiting sessions of a replica",
        "short",
        "Average; the autoscalers' first metric.",
        gauges("engine_queue_depth", "avg", by="stage"),
    ),
    Panel("KV in use", "percentunit", "Average.", gauges("engine_kv_utilization_ratio", "avg", by="stage")),
    Panel(
        "KV of a running session",
        "bytes",
        "Reserved bytes over running sessions.",
        {
            "{{stage}}": f"{gauge('engine_kv_bytes', where=CACHED, by='stage')}"
            f" / ({gauge('engine_running', where=CACHED, by='stage')} > 0)"
        },
    ),
]

DASHBOARDS = (
    Dashboard(
        "colaserve-overview",
        "colaserve / overview",
        "What callers get, and whether anything is wrong.",
        {"Callers": CALLERS, "Speed": SPEED, "Health": HEALTH},
    ),
    Dashboard(
        "colaserve-stages",
        "colaserve / stages",
        "Encoder, prior and decoder from the inside, and the processes of all roles.",
        {"Load": LOAD, "Forward passes": PASS, "Streams": STREAMS, "Memory": MEMORY, "Processes": PROCESSES},
        stages=True,
    ),
    Dashboard(
        "colaserve-capacity",
        "colaserve / capacity",
        "How much each stage does and could do, and how many replicas that needs: docs/operations.md has the formulas.",
        {"Replicas": REPLICAS, "Work": WORK, "Room": ROOM},
    ),
)
