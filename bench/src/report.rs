//! The table on the terminal and the JSON beside it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::results::Results;
use crate::scenario::Sizes;
use crate::servers::Kind;

pub const FANOUT_100: &str = "fan-out, 100 readers";
pub const FANOUT_300: &str = "fan-out, 300 readers";
pub const LARGE: &str = "fan-out, large document";
pub const MANY: &str = "many documents";
pub const JOIN: &str = "cold join";
pub const IDLE: &str = "idle connections";
pub const DURABLE: &str = "durable writes";

pub fn print(results: &Results, _sizes: &Sizes) {
    for (scenario, servers) in &results.scenarios {
        println!("\n{scenario}");
        for (kind, samples) in servers {
            let mut names: Vec<_> = samples.iter().flat_map(|sample| sample.figures.keys()).collect();
            names.sort();
            names.dedup();
            print!("  {:22}", kind.name());
            for name in names {
                print!(" {name}={:.2}", results.median(scenario, *kind, name).unwrap_or(f64::NAN));
            }
            println!(" {} {:?}", results.failure(scenario, *kind).unwrap_or(""), results.notes(scenario, *kind));
        }
    }
    let _ = Kind::ALL;
}

pub fn write_json(results: &Results, sizes: &Sizes, out: &Path) -> Result<PathBuf> {
    fs::create_dir_all(out)?;
    let path = out.join("latest.json");
    fs::write(&path, serde_json::to_vec_pretty(&serde_json::json!({"sizes": sizes, "results": results}))?)?;
    Ok(path)
}
