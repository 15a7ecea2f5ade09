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
    /// The program, linked statically; once for each architecture
    #[arg(long = "program", value_name = "FILE", required = true)]
    programs: Vec<PathBuf>,
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
    /// Where `layout`, the archive and the list of images are put
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Also write the image's files into this folder, which must not be there: for a build by a container engine
    #[arg(long, value_name = "DIR")]
    tree: Option<PathBuf>,
    /// Print name, digests and paths as JSON
    #[arg(long)]
    json: bool,
}

/// Writes the image.
pub(crate) fn run(options: &Options) -> Result<()> {
    let shipped = Shipped {
        programs: options.programs.clone(),
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
    if let Some(tree) = &options.tree {
        shipped.write_tree(tree)?;
    }
    let platforms = image.platforms()?;
    let list = options.out.join("images.txt");
    fs::write(&list, format!("{}@{}\n", options.name, image.root))
        .with_context(|| format!("cannot write {}", list.display()))?;
    let size = fs::metadata(&archive)?.len();
    if options.json {
        let platforms: serde_json::Map<_, _> =
            platforms.iter().map(|(platform, digest)| (platform.clone(), json!(digest))).collect();
        let told = json!({
            "name": name, "digest": image.root, "platforms": platforms, "bytes": size,
            "layout": layout.display().to_string(), "archive": archive.display().to_string(),
            "images": list.display().to_string(),
        });
        println!("{told}");
    } else {
        println!("image {name}@{}, {} MiB", image.root, size >> 20);
        for (platform, digest) in platforms {
            println!("  {platform:<18} {digest}");
        }
        println!("  as an OCI layout   {}", layout.display());
        println!("  as one file        {}", archive.display());
        println!("  names with digest  {}", list.display());
    }
    Ok(())
}
