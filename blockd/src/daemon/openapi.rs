//! The OpenAPI document, made from the handlers and the wire types.

use utoipa::OpenApi;

use super::api;

/// The document that `/openapi.json` answers.
pub(super) fn document() -> utoipa::openapi::OpenApi {
    Document::openapi()
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "blockd",
        description = "Control of blockd: disks that are served over vhost-user-blk, and moves of them. \
                       HTTP/1.1 with JSON on a Unix socket.",
        license(name = "MIT OR Apache-2.0")
    ),
    paths(
        api::list_disks,
        api::attach_disk,
        api::show_disk,
        api::detach_disk,
        api::flush_disk,
        api::snapshot_disk,
        api::resize_disk,
        api::release_disk,
        api::reclaim_disk,
        api::start_move,
        api::list_jobs,
        api::show_job,
        api::set_job,
        api::pause_job,
        api::resume_job,
        api::switch_job,
        api::cancel_job,
        api::job_receipt,
        api::events,
        api::show_metrics,
        api::show_openapi,
    )
)]
struct Document;

#[cfg(test)]
mod tests {
    /// The table at the top of the wire types' crate, which other people read.
    const TABLE: &str = include_str!("../../api/src/lib.rs");

    fn routes_of_the_table() -> Vec<(String, String)> {
        let rows = TABLE.lines().filter_map(|line| line.strip_prefix("//! | `"));
        let mut routes = Vec::new();
        for row in rows {
            let (route, rest) = row.split_once('`').expect("a route in backquotes");
            let (method, path) = route.split_once(' ').expect("a method and a path");
            let path = path.split('?').next().expect("a path");
            routes.push((method.to_lowercase(), path.to_owned()));
            // "(`resume`, `switch`, `cancel`)": further verbs in place of the last.
            let cell = rest.split('|').next().expect("the rest of the cell");
            let stem = path.rsplit_once('/').expect("a slash").0;
            let more = cell.split('`').skip(1).step_by(2);
            routes.extend(more.map(|verb| (method.to_lowercase(), format!("{stem}/{verb}"))));
        }
        routes
    }

    #[test]
    fn every_route_of_the_table_is_in_the_document_and_no_other() {
        let document = serde_json::to_value(super::document()).expect("JSON");
        let paths = document["paths"].as_object().expect("paths");
        let mut documented: Vec<_> = paths
            .iter()
            .flat_map(|(path, item)| {
                let methods = item.as_object().expect("operations").keys();
                methods.map(move |method| (method.clone(), path.clone()))
            })
            .collect();
        let mut table = routes_of_the_table();
        assert_eq!(table.len(), 21);
        documented.sort();
        table.sort();
        assert_eq!(documented, table);
    }

    #[test]
    fn every_reference_in_the_document_leads_somewhere() {
        let document = serde_json::to_value(super::document()).expect("JSON");
        let schemas = document["components"]["schemas"].as_object().expect("schemas");
        let text = document.to_string();
        let mut references = 0;
        for part in text.split("\"#/components/schemas/").skip(1) {
            let name = part.split('"').next().expect("a name");
            assert!(schemas.contains_key(name), "{name} is not described");
            references += 1;
        }
        assert!(references > 20);
        for name in [
            "AttachRequest",
            "DiskInfo",
            "MoveRequest",
            "JobSettings",
            "Job",
            "Receipt",
            "Event",
            "ErrorBody",
        ] {
            assert!(schemas.contains_key(name), "{name}");
        }
    }
}
