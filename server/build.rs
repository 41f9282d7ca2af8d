//! The migrations are compiled in, and the compiler cannot know of a file that is new among them.

fn main() {
    println!("cargo:rerun-if-changed=../migrations");
}
