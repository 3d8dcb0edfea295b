from colaserve_bench.commands import bench

bench(prog_name="colaserve bench")
