from colaserve_services.bench.commands import bench

bench(prog_name="colaserve bench")
