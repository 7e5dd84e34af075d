//! `events`: what happened to disks and moves.

use blockd_api::Event;
use clap::Args as ClapArgs;

use crate::client::Client;
use crate::failure::{Exit, Failure};
use crate::render::Screen;

/// Show what happened to disks and moves
#[derive(Debug, ClapArgs)]
#[command(after_help = "Example:\n  blockctl events --follow")]
pub(crate) struct Args {
    /// Go on with what happens from now on, until ^C
    #[arg(long, short)]
    follow: bool,
}

/// `blockctl events`
pub(crate) async fn run(args: &Args, client: &Client, screen: Screen) -> Result<Exit, Failure> {
    let mut events = client.events(args.follow).await?;
    while let Some(event) = events.next().await? {
        screen.show(&event, line)?;
    }
    if args.follow {
        return Err(Failure::new(
            "unreachable",
            "the daemon has ended, and its events with it; start it and try again",
        ));
    }
    Ok(Exit::Done)
}

fn line(event: &Event) -> String {
    let mut line = format!("{}  {:<17}", event.time, event.kind);
    for subject in [&event.disk, &event.job].into_iter().flatten() {
        line.push(' ');
        line.push_str(subject);
    }
    if !event.message.is_empty() {
        line.push_str(": ");
        line.push_str(&event.message);
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_a_line_with_its_time_kind_subjects_and_message() {
        let event = Event {
            seq: 1,
            time: "2026-01-02T03:04:05Z".into(),
            kind: "job-state".into(),
            disk: Some("vm1".into()),
            job: Some("m1".into()),
            message: "copying".into(),
        };
        assert_eq!(line(&event), "2026-01-02T03:04:05Z  job-state         vm1 m1: copying");
    }
}
