//! A store under a load to look at in tokio-console: a tier that fills, a storm of prefetches, and
//! a reader that looks stuck.
//!
//! ```sh
//! export RUSTFLAGS="--cfg tokio_unstable"
//! cargo run -p vmem-console --target-dir target/unstable
//! tokio-console    # in another terminal; `cargo install tokio-console --locked`
//! ```
//!
//! Memory holds a third of the objects. In turns of twelve seconds somebody reads and keeps nearly
//! all that fits, and then a reader asks for one more: it waits for space until they let go. The
//! console lists it under the resource `reads`, with its task, and says that it waits for space.

use std::net::SocketAddr;
use std::time::Duration;

use clap::Parser;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// A store under a load to look at in tokio-console.
#[derive(Debug, Parser)]
struct Arguments {
    /// Where the console finds it.
    #[arg(long, default_value = "127.0.0.1:6669")]
    listen: SocketAddr,
    /// How long it runs, in seconds; until it is interrupted, if not given.
    #[arg(long)]
    seconds: Option<u64>,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    if !cfg!(tokio_unstable) {
        anyhow::bail!("the console needs `--cfg tokio_unstable`: see the first lines of main.rs");
    }
    tracing_subscriber::registry().with(vmem_console::layer(arguments.listen)).init();
    println!("tokio-console http://{}", arguments.listen);

    let end = async {
        match arguments.seconds {
            Some(seconds) => tokio::time::sleep(Duration::from_secs(seconds)).await,
            None => drop(tokio::signal::ctrl_c().await),
        }
    };
    vmem_console::run(end).await
}
