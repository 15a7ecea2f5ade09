//! `peili-lab image`: writes the image that Peili is shipped as. It compiles nothing: `cargo xtask image` does, and calls this.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use peili_lab::image::{Shipped, write_archive};
use serde_json::json;

/// Which files, and where to.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The program, linked statically
    #[arg(long, value_name = "FILE")]
    program: PathBuf,
    /// The folder with the policies' components
    #[arg(long, value_name = "DIR")]
    policies: PathBuf,
    /// Roots for TLS, as PEM
    #[arg(long, value_name = "FILE", default_value = "/etc/ssl/certs/ca-certificates.crt")]
    roots: PathBuf,
    /// Its name, without a tag: that is the version. With a host: containerd's CRI finds an imported image by no other name
    #[arg(long, default_value = "localhost/peili")]
    name: String,
    /// Its time, in seconds since 1970
    #[arg(long, default_value_t = 0)]
    created: u64,
    /// The commit it was built from
    #[arg(long, default_value = "")]
    revision: String,
    /// Where `layout` and the archive are put
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Print name, digest and paths as JSON
    #[arg(long)]
    json: bool,
}

/// Writes the image.
pub(crate) fn run(options: &Options) -> Result<()> {
    let shipped = Shipped {
        program: options.program.clone(),
        libraries: Vec::new(),
        policies: Shipped::policies(&options.policies),
        roots: options.roots.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
        revision: options.revision.clone(),
        created: options.created,
    };
    let image = shipped.build(&options.name)?;
    let name = format!("{}:{}", options.name, image.tag);
    let (layout, archive) = (options.out.join("layout"), options.out.join("image.tar"));
    if layout.exists() {
        fs::remove_dir_all(&layout).with_context(|| format!("cannot replace {}", layout.display()))?;
    }
    image.write_layout(&layout, Some(&name))?;
    write_archive(&layout, options.created, &archive)?;
    let size = fs::metadata(&archive)?.len();
    if options.json {
        let (layout, archive) = (layout.display().to_string(), archive.display().to_string());
        let told =
            json!({"name": name, "digest": image.root, "bytes": size, "layout": layout, "archive": archive});
        println!("{told}");
    } else {
        println!("image {name}@{}, {} MiB", image.root, size >> 20);
        println!("  as an OCI layout   {}", layout.display());
        println!("  as one file        {}", archive.display());
    }
    Ok(())
}
