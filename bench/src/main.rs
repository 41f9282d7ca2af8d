mod bare;
mod client;
mod frames;
mod process;
mod session;
mod workload;

fn main() {}
