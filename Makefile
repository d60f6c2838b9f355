# make: build with the kernels.  make run: a short story.  make test: all that runs without a GPU.  make cuda: get nvcc.
# Everything in one profile, so that the dependencies and the kernels are compiled once.
.PHONY: all run test cuda
all: cuda
	cargo build --release
run: cuda
	cargo run --release -- generate --echo -p "Once upon a time" --temperature 0.6 --top-p 0.95 --seed 6 -n 200
test: cuda
	scripts/test.sh --release
cuda:
	@scripts/get-cuda.sh
